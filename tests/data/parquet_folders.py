"""Folders of Parquet in the hub's layout, made of noise."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np
from PIL import Image

from edgeqat.data.dataset import Dataset
from edgeqat.data.sources import load

SIZE = 8


def encode(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def noise(n: int, seed: int, size: int = SIZE) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (size, size, 3), dtype=np.uint8) for _ in range(n)]


def write(
    folder: Path,
    part: str,
    images: Sequence[bytes],
    labels: Sequence[int],
    names: list[str] | None = None,
    column: str = "img",
    shard: int = 0,
) -> None:
    """Writes one shard as the hub does: an Image feature, and a ClassLabel when there are names."""
    label = datasets.Value("int64") if names is None else datasets.ClassLabel(names=names)
    table = datasets.Dataset.from_dict(
        {column: [{"bytes": data, "path": None} for data in images], "label": list(labels)},
        features=datasets.Features({column: datasets.Image(), "label": label}),
    )
    table.to_parquet(str(folder / f"{part}-{shard:05d}-of-00001.parquet"))


def write_both(folder: Path, train_n: int = 40, test_n: int = 6, names: list[str] | None = None) -> None:
    write(folder, "train", [encode(x) for x in noise(train_n, 0)], [i % 2 for i in range(train_n)], names)
    write(folder, "test", [encode(x) for x in noise(test_n, 1)], [i % 2 for i in range(test_n)], names)


def load_folder(folder: Path, calibration_n: int = 4, image_size: int = SIZE) -> Dataset:
    return load(str(folder), image_size=image_size, mean=None, std=None, calibration_n=calibration_n)
