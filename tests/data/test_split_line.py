"""What a run says of its split."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from edgeqat.data.dataset import Dataset, Split
from edgeqat.data.sources import load
from edgeqat.data.split_line import split_line, split_warning
from helpers import CommandLine


def of(train: int, calibration: int, labels: tuple[str, ...] | None = ("a", "b")) -> Dataset:
    parts = [
        Split(torch.zeros(n, 3), None if labels is None else torch.arange(n) % 2) for n in (train, calibration, 3, 4)
    ]
    return Dataset("s", *parts, mean=None, std=None, labels=labels)


def test_every_part_is_counted() -> None:
    assert split_line(of(8, 2)) == "17 samples, 2 classes: 8 train, 3 validation, 2 calibration, 4 test"
    assert split_line(of(0, 2, None)) == "9 samples: 3 validation, 2 calibration, 4 test"


@pytest.mark.parametrize(("train", "warned"), [(5, False), (4, True)])
def test_more_calibration_than_training_is_warned_of(train: int, warned: bool) -> None:
    found = split_warning(of(train, 5))
    assert (found is not None) == warned
    if found is not None:
        assert found.startswith("5 samples calibrate and 4 are left to train on") and "data.calibration_n" in found


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for kind in range(4):
        (tmp_path / "images" / f"k{kind}").mkdir(parents=True)
        for i in range(200):
            pixels = np.full((2, 2, 3), 20 * kind + i // 2, np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / f"k{kind}" / f"{i}.png")
    return tmp_path / "images"


def test_the_default_eats_most_of_a_small_set_and_a_run_says_so(
    command: CommandLine, images: Path, tmp_path: Path
) -> None:
    data = load(str(images), image_size=2, mean=None, std=None, calibration_n=512)
    line = "800 images, 4 classes: 64 train, 64 validation, 512 calibration, 160 test"
    assert split_line(data) == line
    settings = ["data.calibration_n=512", f"data.source={images}", "data.image_size=16", "gate.runtimes=[litert]"]
    ended = command("run", "digits-edge", "-o", tmp_path / "run", *(f"--set={text}" for text in settings))
    told = ended.err.splitlines()  # it is refused afterwards, which is quicker than to train
    assert ended.code == 2 and f"          {line}" in told
    assert any(text.strip().startswith("warning: 512 samples calibrate and 64 are left to train on") for text in told)
