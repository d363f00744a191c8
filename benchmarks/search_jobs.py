"""What jobs bring: sensitivity and a search in one process and in several, in turns, and whether they find the same.

    python benchmarks/search_jobs.py [--model resnet20] [--jobs 2] [--samples 256] [--batch 64] [--rounds 3]
                                     [--what sensitivity search]

Random weights and images of 3x32x32; the search mends a range that was made to saturate, judged by the share of
predictions that stay. Printed for each: the seconds of one process with all threads, of one with as many as a job
has, and of all jobs, which includes their start; the median ratio of the jobs' time to either, with its range over
the rounds; and whether what is found is the same, to the bit, on as many threads.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import joblib
import torch

import edgeqat as eq
from common import print_machine
from edgeqat.diagnose.jobs import Jobs
from qat_variants import MODELS

MAX_DROP = 0.05
SATURATING = {"observer": "percentile", "observer_args": {"percentile": 50.5}}


class Case:
    """A network on random images."""

    def __init__(self, name: str, samples: int, batch: int) -> None:
        torch.manual_seed(0)
        self.model = MODELS[name]().eval()
        self.batches = list(torch.randn(samples, 3, 32, 32).split(batch))
        self.make = functools.partial(eq.prepare, self.model, self.batches[0][:2])
        self.sim = eq.calibrate(self.make(), self.batches[:1])
        first = next(n for n, m in self.model.named_modules() if isinstance(m, torch.nn.Conv2d))
        self.quantize = {"overrides": [{"module": first, "activations": SATURATING}]}

    def sensitivity(self, jobs: int) -> str:
        with Jobs(jobs) as own:
            table = eq.sensitivity(self.sim, self.batches, jobs=own, make=self.make)
        return repr(table)

    def search(self, jobs: int) -> str:
        found = eq.search(
            self.model,
            self.batches[:2],
            [(batch, None) for batch in self.batches],
            limits=eq.Limits(max_drop=MAX_DROP),
            metric="agreement",
            quantize=self.quantize,
            jobs=jobs,
        )
        return repr((found.trials, found.quantize))


def timed(run: Callable[[int], Any], jobs: int, threads: int) -> tuple[float, Any]:
    torch.set_num_threads(threads)
    started = time.perf_counter()
    found = run(jobs)
    return time.perf_counter() - started, found


def compare(name: str, run: Callable[[int], Any], jobs: int, threads: int, rounds: int) -> None:
    share = max(1, threads // jobs)
    seconds: dict[str, list[float]] = {"all": [], "share": [], "jobs": []}
    same = True
    for _ in range(rounds):
        all_threads, _ = timed(run, 1, threads)
        one, wanted = timed(run, 1, share)
        several, found = timed(run, jobs, threads)
        same = same and found == wanted
        for key, value in zip(seconds, (all_threads, one, several), strict=True):
            seconds[key].append(value)
    medians = {key: statistics.median(values) for key, values in seconds.items()}
    print(
        f"{name}, n={rounds}: 1 process {medians['all']:.1f} s with {threads} threads and {medians['share']:.1f} s "
        f"with {share}; {jobs} jobs with {share} each {medians['jobs']:.1f} s"
    )
    for key, what in (("all", f"{threads} threads"), ("share", f"{share} thread(s)")):
        ratios = [a / b for a, b in zip(seconds["jobs"], seconds[key], strict=True)]
        print(f"  jobs / 1 process with {what}: {statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})")
    print(f"  the same on {share} thread(s): {'yes' if same else 'NO'}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet20", choices=sorted(MODELS))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--what", nargs="+", default=["sensitivity", "search"], choices=["sensitivity", "search"])
    args = parser.parse_args()
    threads = torch.get_num_threads()
    print_machine(threads)
    print(f"joblib {joblib.__version__}; {args.model}, {args.samples} images in batches of {args.batch}")
    case = Case(args.model, args.samples, args.batch)
    for what in args.what:
        compare(what, getattr(case, what), args.jobs, threads, args.rounds)


if __name__ == "__main__":
    main()
