"""What quantization-aware training on ImageNet costs: an estimate, from step times measured here and rates assumed.

    python benchmarks/capacity.py [--batch 16] [--rounds 8] [--epochs 3] [--efficiency 0.9] [--rates 500 1000 2000]

Measured: the training step at 3x224x224 in FP32 and quantization-aware (batch norms folded), in turns, on this CPU.
Assumed: how many images a second a GPU trains in FP32 or bf16 (`--rates`; measure your own), that the
quantization-aware step costs there what it costs here relative to that, and the share of the linear speed-up that more
processes reach (`--efficiency`). Then hours = 1,281,167 images x epochs / (rate / cost x GPUs x efficiency); the float
twin, which gets as many epochs, comes on top.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

import edgeqat as eq
from common import print_machine
from edgeqat.zoo.mobilenet_imagenet import mobilenetv2_imagenet
from prepare_scale import ResNet50

IMAGES = 1_281_167
GPUS = (1, 8, 64)


def step_of(model: nn.Module, batch: int) -> Callable[[], None]:
    """A step of SGD on random images."""
    images, targets = torch.randn(batch, 3, 224, 224), torch.arange(batch) % 1000
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    model.train()

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), targets).backward()
        optimizer.step()

    return step


def cost(make: Callable[[], nn.Module], batch: int, rounds: int) -> tuple[float, float, list[float]]:
    """Median seconds of the FP32 step and of the quantized one, and their ratios, a round each."""
    torch.manual_seed(0)
    model = make()
    example = torch.randn(4, 3, 224, 224)
    sim = eq.calibrate(eq.prepare(make().eval(), example[:2]), [example])
    steps = {"fp32": step_of(model, batch), "qat": step_of(sim, batch)}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    order = random.Random(0)
    for index in range(rounds + 1):
        for name in order.sample(list(steps), len(steps)):
            started = time.perf_counter()
            steps[name]()
            if index > 0:  # the first one allocates
                seconds[name].append(time.perf_counter() - started)
    ratios = [q / f for q, f in zip(seconds["qat"], seconds["fp32"], strict=True)]
    return statistics.median(seconds["fp32"]), statistics.median(seconds["qat"]), ratios


def main() -> None:
    """What was measured, then the estimate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--efficiency", type=float, default=0.9)
    parser.add_argument("--rates", type=float, nargs="+", default=[500.0, 1000.0, 2000.0])
    options = parser.parse_args()
    print_machine(torch.get_num_threads())
    for name, make in (("MobileNetV2", mobilenetv2_imagenet), ("ResNet-50", ResNet50)):
        fp32, qat, ratios = cost(make, options.batch, options.rounds)
        ratio = statistics.median(ratios)
        print(
            f"{name}, 3x224x224, batch {options.batch}: FP32 {fp32:.2f} s a step, quantization-aware {qat:.2f} s; "
            f"ratio {ratio:.2f} ({min(ratios):.2f} to {max(ratios):.2f}, {options.rounds} rounds)"
        )
        hours = IMAGES * options.epochs / (options.batch / qat) / 3600
        print(f"  {options.epochs} epochs on this CPU: {hours:.0f} hours")
        for rate in options.rates:
            estimates = [
                IMAGES * options.epochs * ratio / (rate * n * (1.0 if n == 1 else options.efficiency)) / 3600
                for n in GPUS
            ]
            told = ", ".join(f"{n} GPU{'s' if n > 1 else ''} {h:.2f} h" for n, h in zip(GPUS, estimates, strict=True))
            print(f"  estimate at {rate:.0f} FP32 images/s a GPU, {options.epochs} epochs: {told}")


if __name__ == "__main__":
    main()
