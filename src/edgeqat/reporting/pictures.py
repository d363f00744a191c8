"""Pictures of the test samples that a quantized model sees differently, as small PNG files beside the report."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from edgeqat.data.dataset import Samples
from edgeqat.files import write_atomically
from edgeqat.reporting.schema import Report

__all__ = ["FOLDER", "MOST_PICTURES", "flipped", "picture_path", "write_pictures"]

FOLDER = "samples"

MOST_PICTURES = 24

LARGEST_SIDE = 160
"""In pixels: a larger image is made smaller."""


def picture_path(index: int) -> str:
    """The file of a test sample, counted from 0, relative to the report."""
    return f"{FOLDER}/test-{index}.png"


def flipped(report: Report) -> list[int]:
    """The test samples to be shown, of all rows that list flips, the first ones of each in turn."""
    lists = [
        [sample.index for sample in row.changes.flips.samples]
        for row in report.results
        if row.changes is not None and row.changes.flips is not None
    ]
    chosen: dict[int, None] = {}
    for place in range(max(map(len, lists), default=0)):
        for found in lists:
            if place < len(found) and len(chosen) < MOST_PICTURES:
                chosen[found[place]] = None
    return list(chosen)


def write_pictures(split: Samples, indices: Sequence[int], folder: Path) -> None:
    """Writes the samples that are images, grey or in colour; writes nothing where they are none.

    Raises:
        OutputError: A file cannot be written.
    """
    if split.image_size is None or split.blank().shape[1] not in (1, 3):
        return
    for index in indices:
        taken = split.take(torch.tensor([index])).inputs
        assert isinstance(taken, Tensor)
        (folder / FOLDER).mkdir(exist_ok=True)
        write_atomically(folder / picture_path(index), _png(taken[0]))


def _png(image: Tensor) -> bytes:
    """uint8 [C, H, W] as PNG."""
    from PIL import Image

    pixels = image.permute(1, 2, 0).contiguous().cpu().numpy()
    found = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    found.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    written = io.BytesIO()
    found.save(written, format="PNG")
    return written.getvalue()
