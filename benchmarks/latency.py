"""INT8 against FP32 latency of finished runs, on each of their runtimes, interleaved call by call.

    python benchmarks/latency.py RUN [RUN ...] [--threads 1] [--batch 1] [--repeats 7]

Each repeat loads fresh sessions, warms them up and times 2,000 interleaved rounds. Printed: the median over the
repeats of the ratio of medians, its smallest and largest, and the sizes of both files. Run it with nothing else
running.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from torch import Tensor

import edgeqat as eq
from common import open_run, print_machine
from edgeqat.measuring.latency import measure_latency


def main() -> None:
    """Prints one block a run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    print_machine(options.threads)
    for folder in options.runs:
        run = open_run(folder)
        inputs = next(iter(run.test_batches(options.batch)))[0]
        for runtime in run.artifacts:
            report(folder, runtime, inputs, options)


def report(folder: Path, runtime: str, inputs: Tensor, options: argparse.Namespace) -> None:
    """Prints three lines a runtime."""
    ratios, fp32, int8 = [], [], []
    for _ in range(options.repeats):
        places = {name: folder / "artifacts" / name / runtime for name in ("float_finetuned", "qat")}
        artifacts = {name: eq.load_artifact(place) for name, place in places.items()}
        found = measure_latency(artifacts, {name: [inputs] for name in artifacts}, options.threads)
        medians = {name: latency.percentile(50) for name, latency in found.items()}
        ratios.append(medians["qat"] / medians["float_finetuned"])
        fp32.append(medians["float_finetuned"])
        int8.append(medians["qat"])
    sizes = [artifacts[name].file_bytes for name in ("float_finetuned", "qat")]
    print(
        f"{folder.name}, {runtime}: batch {options.batch}: INT8 {statistics.median(int8):.4f} ms, FP32 "
        f"{statistics.median(fp32):.4f} ms, ratio {statistics.median(ratios):.3f} "
        f"({min(ratios):.3f} to {max(ratios):.3f}, {options.repeats} repeats)"
    )
    print(f"{folder.name}, {runtime}: INT8 {sizes[1]} bytes, FP32 {sizes[0]} bytes, ratio {sizes[0] / sizes[1]:.3f}")
    ran = artifacts["qat"].manifest["coverage"]["runtime_ops"]
    print(f"{folder.name}, {runtime}: INT8 graph as run: {dict(ran)}", flush=True)


if __name__ == "__main__":
    main()
