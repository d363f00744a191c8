"""What post-training quantization loses, and what each aid wins back, on CIFAR-10.

    python benchmarks/ptq.py --data CIFAR10 --weights FOLDER [--models resnet20 mobilenetv2] [--bits 8 4]
                             [--rows minmax mse ...] [--images 10000] [--calibration 512] [--iterations 1000]

Each row prepares the model anew, calibrates it on the same unlabelled images, and applies its aids. Printed: top-1
over the first `--images` test images in ONNX Runtime's exact arithmetic, the drop against float in points with its
paired 95% interval, and the seconds that quantizing took. Activations have 8 bits and the range of the observer
"histogram"; the plan is that of ONNX Runtime with its defaults, first and last layer included. --data is a recipe's
data.source.
"""

from __future__ import annotations

import argparse
import copy
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import edgeqat as eq
from common import print_machine
from edgeqat.data.batches import Batches
from edgeqat.data.dataset import Dataset
from edgeqat.data.sources import load
from edgeqat.intervals import paired_difference
from parity import BATCH, MEAN, STD
from runtimes import build


@dataclass(frozen=True)
class Aids:
    """What is done beside calibration."""

    observer: str = "minmax"
    per_channel: bool = True
    equalize: bool = False
    adaround: bool = False
    correct_bias: bool = False


ROWS = {
    "minmax": Aids(),
    "minmax+equalize": Aids(equalize=True),
    "minmax+bias": Aids(correct_bias=True),
    "minmax+adaround": Aids(adaround=True),
    "mse": Aids("mse"),
    "mse+equalize": Aids("mse", equalize=True),
    "mse+bias": Aids("mse", correct_bias=True),
    "mse+adaround": Aids("mse", adaround=True),
    "mse+adaround+bias": Aids("mse", adaround=True, correct_bias=True),
    "per-tensor": Aids(per_channel=False),
    "per-tensor+equalize": Aids(per_channel=False, equalize=True),
    "per-tensor+equalize+bias": Aids(per_channel=False, equalize=True, correct_bias=True),
}


def quantized(
    model: nn.Module, aids: Aids, bits: int, calibration: list[Tensor], config: eq.AdaRoundConfig
) -> eq.SimulatedModel:
    """The model after calibration and its aids."""
    weight = eq.WeightConfig(bits=bits, observer=aids.observer, per_channel=aids.per_channel)
    sim = eq.prepare(model, calibration[0], "onnxruntime", eq.QConfig(weight=weight))
    if aids.equalize:
        eq.equalize(sim)
    eq.calibrate(sim, calibration)
    twin = copy.deepcopy(sim)
    if aids.adaround:
        eq.adaround(sim, calibration, config)
    if aids.correct_bias:
        eq.correct_biases(sim, calibration, twin)
    return sim


def test_batches(data: Dataset, n: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The first n test images with their labels."""
    yield from Batches(data.test.take(torch.arange(n)), batch_size=BATCH, mean=MEAN, std=STD)


def right(model: nn.Module, data: Dataset, n: int) -> Tensor:
    """Which of n test images are classified rightly, bool [n]."""
    with torch.no_grad():
        return torch.cat([model(x).argmax(1) == y for x, y in test_batches(data, n)])


def main() -> None:
    """Every model, width of weights and row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument(
        "--models", nargs="+", choices=["resnet20", "mobilenetv2"], default=["resnet20", "mobilenetv2"]
    )
    parser.add_argument("--bits", nargs="+", type=int, default=[8, 4])
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--images", type=int, default=10000)
    parser.add_argument("--calibration", type=int, default=512)
    parser.add_argument("--iterations", type=int, default=eq.AdaRoundConfig().iterations)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    print_machine(torch.get_num_threads())
    data = load(options.data, image_size=32, mean=MEAN, std=STD, calibration_n=options.calibration)
    calibration = [x for x, _ in Batches(data.calibration, batch_size=BATCH, mean=MEAN, std=STD)]
    config = eq.AdaRoundConfig(iterations=options.iterations)
    for name in options.models:
        model = build(name, options.weights)
        twin = right(model, data, options.images)
        print(f"{name}: float top-1 {100 * twin.double().mean():.2f}% over {len(twin)} images", flush=True)
        for bits in options.bits:
            for row in options.rows:
                began = time.perf_counter()
                sim = quantized(model, ROWS[row], bits, calibration, config)
                seconds = time.perf_counter() - began
                with sim.exact("onnxruntime") as exact:
                    own = right(exact, data, options.images)
                drop = paired_difference(twin, own)
                print(
                    f"{name} W{bits}A8 {row}: top-1 {100 * own.double().mean():.2f}%, drop {100 * drop.value:+.2f} "
                    f"({100 * drop.low:+.2f}..{100 * drop.high:+.2f}) points; quantized in {seconds:.0f} s",
                    flush=True,
                )


if __name__ == "__main__":
    main()
