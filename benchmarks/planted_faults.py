"""Two faults planted in ResNet-20 on CIFAR-10: are they found, and mended by touching nothing else?

    python benchmarks/planted_faults.py --data CIFAR10 --weights FILE.safetensors [--max-drop 0.005]
                                        [--qat-images 10000] [--qat-epochs 1] [--test-images 10000]
                                        [--search-images 5000] [--cases outlier ...]

An outlier channel: behind the batch norm of layer2.1.conv1 a channel is scaled by 1000, and layer2.1.conv2 undoes it;
the float function stays. A saturating range: the first conv's output keeps half of its values (percentile 50.5).
Printed for each fault and for both: where sensitivity ranks them, the drop before and after the search on the
validation images that it was made on and on test images, what it touched, and the drop after QAT alone.
Drops are in the integers of ONNX Runtime on this machine, on pairs, with 95% intervals.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import edgeqat as eq
from common import print_machine
from edgeqat.data.batches import Batches
from edgeqat.data.dataset import Dataset
from edgeqat.data.sources import load
from edgeqat.diagnose.cheapest import Trial
from edgeqat.diagnose.search import describe_trial
from edgeqat.factory import build_mapping
from edgeqat.metrics import METRICS, evaluate
from edgeqat.recipe_quantize import QuantizeSection
from edgeqat.train.checkpoint import load_weights
from edgeqat.zoo import resnet20

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CALIBRATION_N, BATCH, RANKED = 512, 128, 4
TARGET = "onnxruntime"
OUTLIER, OUTLIER_AT, CHANNEL = 1000.0, "layer2.1", 3
SATURATED = "conv1"
SATURATING = {
    "module": SATURATED,
    "activations": {"observer": "percentile", "observer_args": {"percentile": 50.5}},
}


def planted(model: nn.Module) -> nn.Module:
    """A copy with the outlier channel."""
    model = copy.deepcopy(model)
    block = model.get_submodule(OUTLIER_AT)
    with torch.no_grad():
        block.bn1.weight[CHANNEL] *= OUTLIER
        block.bn1.bias[CHANNEL] *= OUTLIER
        block.conv2.weight[:, CHANNEL] /= OUTLIER
    return model


class Case:
    """A network with faults, on its data."""

    def __init__(
        self, model: nn.Module, quantize: QuantizeSection, data: Dataset, options: argparse.Namespace
    ) -> None:
        self.model, self.quantize, self.data, self.options = model, quantize, data, options
        self.calibration = self.batches(data.calibration).inputs()

    def batches(self, split: Any, **more: Any) -> Batches:
        return Batches(split, batch_size=BATCH, mean=MEAN, std=STD, **more)

    def simulation(self, quantize: QuantizeSection) -> eq.SimulatedModel:
        example = next(iter(self.calibration))[:2]
        sim = eq.prepare(self.model, example, TARGET, build_mapping(quantize))
        if quantize.ptq.equalize:
            eq.equalize(sim)
        return eq.calibrate(sim, self.calibration).eval()

    def drop(self, sim: eq.SimulatedModel) -> str:
        """The drop on test images."""
        test = self.batches(self.data.test.take(torch.arange(self.options.test_images)))
        twin = evaluate(self.model, test, METRICS["top1"])
        with sim.exact(TARGET):
            own = evaluate(sim, test, METRICS["top1"])
        lost = METRICS["top1"].drop(twin.statistics, own.statistics)
        return f"{100 * lost.value:+.2f} points ({100 * lost.low:+.2f}..{100 * lost.high:+.2f})"

    def report(self, name: str) -> None:
        print(f"\n{name}")
        before = self.simulation(self.quantize)
        split = self.data.validation.take(torch.arange(min(self.options.search_images, len(self.data.validation))))
        held_out = self.batches(split)
        inputs = [x for x, _ in held_out][:RANKED]
        table = eq.sensitivity(before, inputs)
        for when in ("only", "without"):
            first = [row.unit.name for row in table.ranked(by="kl", when=when)[:3]]
            print(f"  sensitivity, {when}, first of {len(table.ranked())}: {', '.join(first)}")
        print(f"  before: {self.drop(before)}")
        started = time.perf_counter()
        found = eq.search(
            self.model,
            self.calibration,
            held_out,
            limits=eq.Limits(max_drop=self.options.max_drop),
            quantize=self.quantize,
            on_trial=self.tell,
        )
        took = time.perf_counter() - started
        print(f"  search, {len(found.trials)} trials in {took:.0f} s: {describe_trial(found.best, True)}")
        print(f"  after search: {self.drop(self.simulation(found.quantize))}")
        budget = f"{self.options.qat_epochs} epoch(s) of {self.options.qat_images} images"
        print(f"  QAT alone, {budget}: {self.drop(self.trained())}")

    def tell(self, trial: Trial, missed: tuple[str, ...]) -> None:
        print(f"    {describe_trial(trial, True)}: {'fails' if missed else 'passes'}", flush=True)

    def trained(self) -> eq.SimulatedModel:
        sim = self.simulation(self.quantize)
        images = self.data.train.take(torch.arange(self.options.qat_images))
        train = self.batches(images, shuffle=True, augment=("crop", "flip"))
        eq.fit(sim, train, epochs=self.options.qat_epochs, lr=0.002, weight_decay=0.0005, max_grad_norm=1.0)
        return sim


def main() -> None:
    """Prints each case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--max-drop", type=float, default=0.005)
    parser.add_argument("--qat-images", type=int, default=10_000)
    parser.add_argument("--qat-epochs", type=int, default=1)
    parser.add_argument("--test-images", type=int, default=10_000)
    parser.add_argument("--search-images", type=int, default=5_000)
    parser.add_argument("--cases", nargs="+", default=["outlier", "saturation", "both"])
    options = parser.parse_args()
    print_machine(torch.get_num_threads())
    data = load(
        options.data, image_size=32, mean=list(MEAN), std=list(STD), calibration_n=CALIBRATION_N, needs_labels=True
    )
    plain = resnet20(10)
    load_weights(plain, options.weights)
    plain.eval()
    saturating = QuantizeSection.model_validate({"overrides": [SATURATING]})
    cases = {
        "outlier": Case(planted(plain), QuantizeSection(), data, options),
        "saturation": Case(plain, saturating, data, options),
        "both": Case(planted(plain), saturating, data, options),
    }
    for name in options.cases:
        cases[name].report(name)


if __name__ == "__main__":
    main()
