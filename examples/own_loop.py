"""Quantization-aware training in your own loop: your optimizer, schedule and loss; a simulation is a module like any.

    python examples/own_loop.py [--epochs 8]

One function trains the float model and the simulation of 2-bit weights. Handwritten digits, seconds on one core.
"""

from __future__ import annotations

import argparse
from tempfile import TemporaryDirectory

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, random_split

import edgeqat as eq


def network() -> nn.Sequential:
    """float images [N, 1, 8, 8] to 10 logits."""

    def conv(inputs: int, outputs: int, stride: int) -> nn.Sequential:
        layer = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.ReLU())

    return nn.Sequential(conv(1, 16, 1), conv(16, 24, 2), conv(24, 32, 2), nn.Flatten(), nn.Linear(32 * 4, 10))


def train(model: nn.Module, loader: DataLoader[tuple[Tensor, ...]], epochs: int, lr: float) -> None:
    """Nothing here knows of quantization."""
    criterion = nn.CrossEntropyLoss(label_smoothing=0.05)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, epochs=epochs, steps_per_epoch=len(loader))
    model.train()
    for _ in range(epochs):
        for images, targets in loader:
            optimizer.zero_grad()
            criterion(model(images), targets).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    model.eval()


def accuracy(model: nn.Module, images: Tensor, targets: Tensor) -> float:
    """The share of images that are classified rightly."""
    with torch.no_grad():
        return float((model(images).argmax(1) == targets).float().mean())


def main() -> None:
    """Prints the accuracy of each stage, and what the file computes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=8)
    options = parser.parse_args()
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.from_numpy(digits.images).float().div(16).unsqueeze(1)
    training, testing = random_split(TensorDataset(images, torch.from_numpy(digits.target)), [0.7, 0.3])
    loader = DataLoader(training, batch_size=64, shuffle=True)
    test_images, test_targets = testing[:]

    model = network()
    train(model, loader, options.epochs, lr=0.01)
    in_float = accuracy(model, test_images, test_targets)

    weights = eq.QConfig(weight=eq.WeightConfig(bits=2))
    sim = eq.prepare(model, test_images[:2], target="onnxruntime", qconfig_mapping=weights)
    eq.calibrate(sim, [images for images, _ in loader])  # training images; no labels are needed
    calibrated = accuracy(sim, test_images, test_targets)
    train(sim, loader, options.epochs, lr=0.003)

    with sim.exact("onnxruntime"):  # the integers of the file that is not written yet
        shipped = accuracy(sim, test_images, test_targets)
        expected = sim(test_images)
    program = eq.convert(sim)
    with TemporaryDirectory() as folder:
        artifact = eq.lower(program, "onnxruntime", f"{folder}/digits")
        parity = eq.verify(artifact, program, [test_images])
        assert torch.equal(artifact.run(test_images), expected), "the file computes something else than was evaluated"
    print(f"test images: float {in_float:.1%}, calibrated {calibrated:.1%}, trained {shipped:.1%}")
    print(f"{parity.bit_identical:.0%} of the file's logits are bit-identical to those evaluated by sim.exact")
    assert parity.bit_identical == 1.0, parity.first_difference
    assert shipped > calibrated + 0.1, "training won back less than it did"


if __name__ == "__main__":
    main()
