"""Folders of image files, made of noise."""

from __future__ import annotations

from pathlib import Path

from parquet_folders import SIZE, encode, noise

from edgeqat.data.dataset import Dataset
from edgeqat.data.sources import load


def fill(folder: Path, n: int, seed: int = 0, suffix: str = ".png") -> None:
    """Writes n images, 0.png and on."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, pixels in enumerate(noise(n, seed)):
        (folder / f"{index}{suffix}").write_bytes(encode(pixels, "JPEG" if suffix == ".jpg" else "PNG"))


def load_images(folder: Path, calibration_n: int = 4, needs_labels: bool = True) -> Dataset:
    return load(
        str(folder), image_size=SIZE, mean=None, std=None, calibration_n=calibration_n, needs_labels=needs_labels
    )
