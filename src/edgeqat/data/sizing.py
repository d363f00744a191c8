"""How an image comes to the size that is wanted, in training and on a device."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Generator, Tensor

__all__ = ["Pixels", "Resize", "Sizing", "draw_crops"]

Pixels = npt.NDArray[np.uint8]
Resize = Literal["stretch", "center_crop"]

MARGIN = 256 / 224
"""What center_crop resizes the shorter side to, in sides of what it cuts out: ImageNet's usual figure."""

AREA = (0.08, 1.0)
RATIO = (3 / 4, 4 / 3)
TRIES = 10
"""A random crop has this share of the image's area and this ratio of width to height; tried so often."""


def draw_crops(n: int, _size: tuple[int, int], generator: Generator) -> Tensor:
    """A row of figures in 0..1 for each image: two for each try, and two for the place."""
    return torch.rand(n, 2 * TRIES + 2, generator=generator)


@dataclass(frozen=True)
class Sizing:
    """What is done with the images of files.

    Attributes:
        side: Of the square images wanted.
        resize: `stretch`: the whole image, without regard to its aspect ratio. `center_crop`: the shorter side to
            `shorter` pixels, then the middle.
    """

    side: int
    resize: Resize = "stretch"

    @property
    def shorter(self) -> int:
        """What center_crop makes of the shorter side."""
        return round(self.side * MARGIN)

    def steps(self) -> dict[str, Any]:
        """What a device has to do, JSON-ready."""
        size = [self.side, self.side]
        if self.resize == "stretch":
            return {"size": size, "method": "bilinear"}
        return {"shorter_side": self.shorter, "center_crop": size, "method": "bilinear"}

    def apply(self, image: Image.Image) -> Pixels:
        """uint8 [side, side, 3]; bilinear, and averaging when it shrinks."""
        rgb = image.convert("RGB")
        if self.resize == "center_crop":
            return np.asarray(self._cut_centre(rgb))
        if rgb.size != (self.side, self.side):
            rgb = rgb.resize((self.side, self.side), Image.Resampling.BILINEAR)
        return np.asarray(rgb)

    def apply_crop(self, image: Image.Image, drawn: Tensor) -> Pixels:
        """A random part, a row of `draw_crops` says which, as uint8 [side, side, 3]."""
        width, height = image.size
        left, top, part_width, part_height = _box(width, height, drawn.tolist())
        # A JPEG can be decoded at a half, a quarter or an eighth; never below what the part needs.
        needed = (math.ceil(width * self.side / part_width), math.ceil(height * self.side / part_height))
        image.draft("RGB", needed)
        x, y = image.size[0] / width, image.size[1] / height
        box = (left * x, top * y, (left + part_width) * x, (top + part_height) * y)
        size = (self.side, self.side)
        return np.asarray(image.convert("RGB").resize(size, Image.Resampling.BILINEAR, box=box))

    def _cut_centre(self, rgb: Image.Image) -> Image.Image:
        width, height = rgb.size
        shorter = min(width, height)
        width, height = self.shorter * width // shorter, self.shorter * height // shorter
        if rgb.size != (width, height):
            rgb = rgb.resize((width, height), Image.Resampling.BILINEAR)
        left, top = (width - self.side) // 2, (height - self.side) // 2
        return rgb.crop((left, top, left + self.side, top + self.side))


def _box(width: int, height: int, drawn: list[float]) -> tuple[int, int, int, int]:
    """(left, top, width, height) of the first try that fits; of the largest middle part where none does."""
    x, y = drawn[-2:]
    low, high = map(math.log, RATIO)
    for attempt in range(TRIES):
        area = width * height * (AREA[0] + (AREA[1] - AREA[0]) * drawn[2 * attempt])
        ratio = math.exp(low + (high - low) * drawn[2 * attempt + 1])
        part_width, part_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < part_width <= width and 0 < part_height <= height:
            return int(x * (width - part_width + 1)), int(y * (height - part_height + 1)), part_width, part_height
    part_width = min(width, round(height * RATIO[1]))
    part_height = min(height, round(part_width / RATIO[0]))
    part_width, part_height = max(part_width, 1), max(part_height, 1)
    return (width - part_width) // 2, (height - part_height) // 2, part_width, part_height
