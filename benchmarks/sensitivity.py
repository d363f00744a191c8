"""How long a sensitivity analysis takes, and what branching off a shared run saves.

    python benchmarks/sensitivity.py [--models resnet20 mobilenetv2] [--samples 512] [--batch 128] [--threads 2]

Random weights and images of 3x32x32. Printed for each model: the seconds of `eq.sensitivity` over all samples; and,
on one batch, the time of the runs that it makes by the time of the same runs made whole, in turns, the median of
five. That both give the same bits is checked on the way.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

import edgeqat as eq
from common import print_machine
from edgeqat.diagnose.forks import Forks
from edgeqat.diagnose.sensitivity import NOTHING, Settings
from edgeqat.diagnose.switches import evaluating, quantizing
from qat_variants import MODELS

ROUNDS = 5


def seconds_of_forks(
    sim: eq.SimulatedModel, settings: Settings, batch: torch.Tensor
) -> tuple[float, list[torch.Tensor]]:
    """The runs of one batch as the analysis makes them."""
    forks, started = Forks(sim), time.perf_counter()
    only = dict(forks.run(batch, NOTHING, settings.only))
    without = dict(forks.run(batch, settings.everything, settings.without))
    found = [*(only[i] for i in range(len(only))), *(without[i] for i in range(len(without)))]
    return time.perf_counter() - started, found


def seconds_of_whole_runs(
    sim: eq.SimulatedModel, settings: Settings, batch: torch.Tensor
) -> tuple[float, list[torch.Tensor]]:
    """The same runs, each from the beginning."""
    started, found = time.perf_counter(), []
    for names in (*settings.only, *settings.without):
        with quantizing(sim, names):
            found.append(sim(batch))
    return time.perf_counter() - started, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet20", "mobilenetv2"], choices=sorted(MODELS))
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print_machine(args.threads)
    for name in args.models:
        torch.manual_seed(0)
        batches = list(torch.randn(args.samples, 3, 32, 32).split(args.batch))
        sim = eq.calibrate(eq.prepare(MODELS[name]().eval(), batches[0][:2]), batches[:1])
        settings, started = Settings(sim), time.perf_counter()
        table = eq.sensitivity(sim, batches)
        seconds = time.perf_counter() - started
        print(f"{name}: {len(table.rows)} rows, {len(settings)} runs a batch, {table.n} images: {seconds:.1f} s")
        ratios = []
        with evaluating(sim):
            for _ in range(ROUNDS):
                shared, found = seconds_of_forks(sim, settings, batches[0])
                whole, wanted = seconds_of_whole_runs(sim, settings, batches[0])
                assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
                ratios.append(shared / whole)
        print(f"{name}: shared / whole runs {statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})")


if __name__ == "__main__":
    main()
