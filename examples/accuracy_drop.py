"""Where accuracy is lost at 3-bit weights, and three ways to win it back: a plan that is searched, AdaRound, training.

    python examples/accuracy_drop.py [--epochs 8]

Handwritten digits, which need no download; a minute on two cores. All figures but the last line's are of validation
samples, which nothing is trained on; choices are made on them, so the test samples judge.
"""

from __future__ import annotations

import argparse

import torch
from torch import nn

import edgeqat as eq
from edgeqat.data.batches import Batches
from edgeqat.data.dataset import Split
from edgeqat.data.sources import load
from edgeqat.metrics import evaluate, resolve_metric
from edgeqat.signature import call
from edgeqat.zoo import edge_model

LOW = {"weights": {"bits": 3, "observer": "mse"}}
"""The `quantize` section of a recipe."""


def accuracy(model: nn.Module, batches: Batches) -> float:
    """The share of samples that are classified rightly, in per cent."""
    scores = evaluate(lambda inputs: call(model, inputs), batches, resolve_metric("top1"))
    return 100 * float(scores.statistics.double().mean())


def main() -> None:
    """Prints what each way gives."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=8)
    options = parser.parse_args()
    torch.manual_seed(0)
    data = load("digits", image_size=32, mean=None, std=None, calibration_n=128)

    def batches(split: Split, shuffle: bool = False) -> Batches:
        return Batches(split, batch_size=32, mean=data.mean, std=data.std, shuffle=shuffle)

    training, validation, test = batches(data.train, shuffle=True), batches(data.validation), batches(data.test)
    calibration = [inputs for inputs, _ in batches(data.calibration)]
    model = edge_model()
    eq.fit(model, training, epochs=options.epochs, lr=0.05, exact=None)

    # 1. What is lost, and where.
    mapping = eq.QConfigMapping().set_global(eq.QConfig(weight=eq.WeightConfig(bits=3, observer="mse")))

    def calibrated() -> eq.SimulatedModel:
        return eq.calibrate(eq.prepare(model, calibration[0], qconfig_mapping=mapping), calibration).eval()

    plain = calibrated()
    print(f"float {accuracy(model, validation):.1f}%, weights of 3 bits {accuracy(plain, validation):.1f}%")
    table = eq.sensitivity(plain, validation, "top1")
    for row in table.ranked(parts=["layer"])[:3]:
        print(f"sensitive: {row.unit.name}")

    # 2. The cheapest plan that loses at most a point: more bits, or float, for as few layers as will do.
    found = eq.search(model, calibration, validation, limits=eq.Limits(max_drop=0.01), quantize=LOW)
    print(f"search, {len(found.trials)} trials: {found.best.choice.describe()}")

    # 3. The same bits everywhere, rounded better.
    rounded = calibrated()
    eq.adaround(rounded, calibration, eq.AdaRoundConfig(iterations=200))

    # 4. The same bits everywhere, trained.
    trained = calibrated()
    eq.fit(trained, training, epochs=2, lr=0.005, max_grad_norm=1.0)
    ways = {"float": model, "3 bits": plain, "AdaRound": rounded, "training": trained}
    print("test samples: " + ", ".join(f"{name} {accuracy(way, test):.1f}%" for name, way in ways.items()))


if __name__ == "__main__":
    main()
