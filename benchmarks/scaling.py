"""How training scales: over processes, and with depth, image size and the number of samples.

    python benchmarks/scaling.py ranks [--rounds 5] [--steps 40]
    python benchmarks/scaling.py growth [--steps 12]

`ranks`: images a second of quantization-aware training of ResNet-20 (batch norms folded, batch 128 over all processes,
crop and flip), in one process with 2 threads and in two processes with 1 thread each, in turns, each round in fresh
processes; and the resident memory of each process. `growth`: one process; seconds a step and memory. Nothing else may
run meanwhile.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

import edgeqat as eq
from common import print_machine
from edgeqat.data.batches import Batches
from edgeqat.data.dataset import Split
from edgeqat.data.share import Share
from edgeqat.processes import Team, team_of
from edgeqat.recipe_compute import ComputeSection
from edgeqat.zoo.resnet import ResNetCifar

BATCH, WARM_UP = 128, 5
DEPTHS, SIDES, SAMPLES = (8, 20, 32, 56), (32, 64, 96), (2_000, 20_000, 200_000)


def images(n: int, side: int) -> Split:
    """n random images, uint8."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8, generator=generator)
    return Split(pixels, torch.arange(n) % 10)


def measured(team: Team, depth: int, side: int, steps: int, n: int, quantized: bool = True) -> dict[str, float]:
    """Images a second over all processes, seconds a step, and this process's peak of memory in MiB."""
    torch.manual_seed(0)
    model = ResNetCifar((depth - 2) // 6, 10).eval()
    ranks = team.ranks
    batches = Batches(
        images(n, side),
        batch_size=BATCH,
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
        augment=("crop", "flip"),
        shuffle=True,
        share=Share(ranks.rank, ranks.size),
    )
    if quantized:
        first = torch.randn(32, 3, side, side)
        model = eq.calibrate(eq.prepare(model, first[:2]), [first])
    moments: list[float] = []

    with contextlib.suppress(KeyboardInterrupt):
        eq.fit(
            model,
            batches,
            epochs=1,
            lr=0.001,
            max_grad_norm=1.0,
            fabric=team.fabric,
            on_step=lambda _: moments.append(time.perf_counter()),
            should_stop=lambda: len(moments) == steps,
        )
    taken = [after - before for before, after in zip(moments[WARM_UP:], moments[WARM_UP + 1 :], strict=False)]
    step = statistics.median(taken)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"images_s": BATCH / (sum(taken) / len(taken)), "step_s": step, "mib": peak}


def worker(steps: int) -> None:
    """One process of a round; the first one prints what it measured."""
    with team_of(ComputeSection()) as team:
        torch.set_num_threads(2 // team.ranks.size)
        found = measured(team, 20, 32, steps, BATCH * (steps + 1))
        every = team.ranks.of_each(found["mib"])
        if team.ranks.first:
            print(json.dumps({**found, "mib": every}))


def of_ranks(rounds: int, steps: int) -> None:
    """A line a round, then the ratio of the two throughputs."""
    own = [str(Path(__file__).resolve()), "worker", "--steps", str(steps)]
    commands = {
        1: [sys.executable, *own],
        2: [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *own],
    }
    ratios = []
    for index in range(rounds):
        found: dict[int, Any] = {}
        for processes in (1, 2) if index % 2 == 0 else (2, 1):
            threads = {"OMP_NUM_THREADS": str(2 // processes)}
            done = subprocess.run(
                commands[processes], env={**os.environ, **threads}, capture_output=True, text=True, check=True
            )
            found[processes] = json.loads(done.stdout.splitlines()[-1])
        ratios.append(found[2]["images_s"] / found[1]["images_s"])
        told = ", ".join(
            f"{n} process{'es' if n > 1 else ''}: {found[n]['images_s']:.0f} images/s, "
            f"{' and '.join(f'{m:.0f}' for m in found[n]['mib'])} MiB"
            for n in (1, 2)
        )
        print(f"round {index + 1}: {told}; ratio {ratios[-1]:.3f}", flush=True)
    print(f"two processes by one with 2 threads: {statistics.median(ratios):.3f} (median of {rounds} rounds, ")
    print(f"{min(ratios):.3f} to {max(ratios):.3f}), {steps - WARM_UP - 1} steps of {BATCH} images a round")


def one_process(depth: int, side: int, n: int, steps: int) -> dict[str, float]:
    """What a fresh process measures."""
    own = [sys.executable, str(Path(__file__).resolve()), "one", "--steps", str(steps)]
    words = ["--depth", str(depth), "--side", str(side), "--samples", str(n)]
    done = subprocess.run([*own, *words], capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def of_growth(steps: int) -> None:
    """Seconds a step by depth and image size; memory and seconds an epoch by samples."""
    few = BATCH * (steps + 1)
    print("ResNet depth | ms a step | ms a step and layer | MiB")
    for depth in DEPTHS:
        found = one_process(depth, 32, few, steps)
        print(
            f"{depth:12} | {1000 * found['step_s']:9.1f} | {1000 * found['step_s'] / depth:19.2f} | {found['mib']:.0f}"
        )
    print("side, ResNet-8 | ms a step | ns a step and pixel | MiB")
    for side in SIDES:
        found = one_process(8, side, few, steps)
        pixels = BATCH * side * side
        print(
            f"{side:14} | {1000 * found['step_s']:9.1f} | {1e9 * found['step_s'] / pixels:19.0f} | {found['mib']:.0f}"
        )
    print("samples, ResNet-8 at 32x32 | ms a step | s an epoch | MiB, of which pixels")
    for n in SAMPLES:
        found = one_process(8, 32, n, steps)
        epoch, pixels = found["step_s"] * n / BATCH, n * 3 * 32 * 32 / 2**20
        print(f"{n:26} | {1000 * found['step_s']:9.1f} | {epoch:10.0f} | {found['mib']:.0f}, {pixels:.0f}")


def main() -> None:
    """Prints the machine, then what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("ranks", "growth", "worker", "one"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--side", type=int, default=32)
    parser.add_argument("--samples", type=int, default=2_000)
    options = parser.parse_args()
    if options.what == "worker":
        worker(options.steps)
    elif options.what == "one":
        print(json.dumps(measured(Team(), options.depth, options.side, options.steps, options.samples)))
    else:
        print_machine(torch.get_num_threads())
        of_ranks(options.rounds, options.steps) if options.what == "ranks" else of_growth(options.steps)


if __name__ == "__main__":
    main()
