"""Your own data and metric in a recipe: a torch Dataset of image files with labels, read by `edgeqat run`.

    python examples/own_dataset.py

The same run from the command line: edgeqat run examples/own_dataset.yaml -o runs/own

A dataset of clocks, which hour does the hand show; the images are made here and written as PNG. An hour off is taken
as right by the metric. Seconds on one core.
"""

from __future__ import annotations

import atexit
import json
import math
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.utils.data import Dataset

import edgeqat as eq

HOURS = [f"{hour} o'clock" for hour in (12, *range(1, 12))]
RECIPE = Path(__file__).with_name("own_dataset.yaml")


class Clocks(Dataset[tuple[Tensor, int]]):
    """PNG files named <number>_<hour>.png, as (uint8 image [3, 24, 24], class)."""

    def __init__(self, folder: Path) -> None:
        self.files = sorted(folder.glob("*.png"))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        file = self.files[index]
        with Image.open(file) as image:
            pixels = torch.from_numpy(np.array(image.convert("RGB")))
        return pixels.permute(2, 0, 1), int(file.stem.split("_")[1])


def draw(folder: Path, n: int, seed: int) -> Path:
    """Writes the files; yours are there already."""
    folder.mkdir()
    random = np.random.default_rng(seed)
    for i, hour in enumerate(random.integers(0, 12, n)):
        image = Image.new("RGB", (24, 24), tuple(random.integers(150, 255, 3)))
        angle, length = 2 * math.pi * hour / 12 + random.normal(0, 0.1), random.uniform(7, 10)
        end = (12 + length * math.sin(angle), 12 - length * math.cos(angle))
        ImageDraw.Draw(image).line([(12, 12), end], fill=tuple(random.integers(0, 90, 3)), width=2)
        image.save(folder / f"{i:04d}_{hour}.png")
    return folder


def make() -> dict[str, object]:
    """data.source: what edgeqat reads. Mean and std are those of the training images unless given here."""
    folder = Path(mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return {
        "train": Clocks(draw(folder / "train", 700, seed=1)),
        "test": Clocks(draw(folder / "test", 200, seed=2)),
        "labels": HOURS,
    }


def within_one_hour(outputs: Tensor, targets: Tensor) -> Tensor:
    """task.metric: right or wrong for each sample, bool [N]."""
    off = (outputs.argmax(1) - targets).abs()
    return torch.minimum(off, 12 - off) <= 1


within_one_hour.higher_is_better = True


def network() -> nn.Sequential:
    """model.factory: float images [N, 3, 24, 24] to 12 logits."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 12), (12, 24), (24, 32)):
        layers += [nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 9, 12))


def main() -> None:
    """Runs the recipe and prints what its report and its artifact say."""
    with TemporaryDirectory() as folder:
        report = eq.run(RECIPE, f"{folder}/run")
        for row in report.results:
            drop = "" if row.drop is None else f", drop {row.drop:+.3f}"
            print(f"{row.variant} on {row.runtime}: {row.metric.name} {row.metric.value:.3f} (n={row.metric.n}){drop}")
        manifest = json.loads(Path(folder, "run/artifacts/qat/onnxruntime/manifest.json").read_text(encoding="utf-8"))
    print(f"labels in the artifact: {', '.join(manifest['preprocessing']['labels'])}")
    print(f"gate {'passed' if report.gate.passed else 'failed'}")
    assert manifest["preprocessing"]["labels"] == HOURS
    assert report.gate.passed, report.gate.checks


if __name__ == "__main__":
    main()
