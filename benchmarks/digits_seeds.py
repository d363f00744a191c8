"""The default recipe on several seeds: accuracy, drop, gate.

python benchmarks/digits_seeds.py [--seeds 0 1 2 3 4] [--recipe digits-edge] [--set KEY=VALUE ...]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

import edgeqat as eq
from common import print_machine
from edgeqat.recipe import load_recipe


def main() -> None:
    """Prints one line a seed, and the spread."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--recipe", default="digits-edge")
    parser.add_argument("--set", dest="settings", action="append", default=[])
    options = parser.parse_args()
    print_machine(torch.get_num_threads())
    drops, floats = [], []
    for seed in options.seeds:
        recipe = load_recipe(options.recipe, [*options.settings, f"train.seed={seed}"])
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            report = eq.run(recipe, Path(folder) / "run")
        rows = {row.variant: row for row in report.results if row.runtime == "onnxruntime"}
        parity = rows["qat"].parity
        assert parity is not None and rows["qat"].drop is not None
        drops.append(100 * rows["qat"].drop)
        floats.append(100 * rows["float"].metric.value)
        print(
            f"seed {seed}: "
            + ", ".join(f"{name} {100 * row.metric.value:.2f}%" for name, row in rows.items())
            + f", drop {drops[-1]:+.2f}, bit-identical {100 * parity.bit_identical:.2f}%, "
            + f"gate {'passed' if report.gate.passed else 'FAILED'}, {time.perf_counter() - started:.0f} s",
            flush=True,
        )
    print(
        f"n = {rows['qat'].metric.n} test images; float {min(floats):.2f}% to {max(floats):.2f}%; drop of QAT against "
        f"its float twin: mean {statistics.mean(drops):+.2f} points ({min(drops):+.2f} to {max(drops):+.2f})"
    )


if __name__ == "__main__":
    main()
