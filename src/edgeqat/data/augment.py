"""Augmentation of whole batches of uint8 images, before normalisation.

Every augmentation first draws figures for each image of a batch, then applies them. Drawing costs little and depends
on nothing but the generator, so that a process can draw for a whole batch and apply to its own part, and can come to
the middle of an epoch without preparing what was before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from edgeqat.data.sizing import draw_crops
from edgeqat.errors import DataError

__all__ = ["AUGMENTATIONS", "Augmentation", "augment", "crop", "find_augmentations", "flip", "random_resized_crop"]

PAD_SHARE = 8
"""A crop moves an image by up to one part in this many of its side: 4 pixels at 32, as is usual for CIFAR."""


@dataclass(frozen=True)
class Augmentation:
    """What is drawn, and what is done with it.

    Attributes:
        draw: (number of images, their height and width, generator) -> a row of figures for each image.
        apply: (uint8 [B, C, H, W], those rows) -> new images of the same shape.
        encoded: Whether it is not `apply` that does it but `Sizing.apply_crop`, as the image is decoded.
    """

    draw: Callable[[int, tuple[int, int], Generator], Tensor]
    apply: Callable[[Tensor, Tensor], Tensor]
    encoded: bool = False

    def __call__(self, images: Tensor, generator: Generator) -> Tensor:
        """Draws for all `images` and applies it."""
        height, width = images.shape[2:]
        return self.apply(images, self.draw(len(images), (height, width), generator))


def _draw_offsets(n: int, size: tuple[int, int], generator: Generator) -> Tensor:
    offsets = [torch.randint(0, 2 * (side // PAD_SHARE) + 1, (n,), generator=generator) for side in size]
    return torch.stack(offsets, dim=1)


def _shift(images: Tensor, offsets: Tensor) -> Tensor:
    channels, height, width = images.shape[1:]
    pad_y, pad_x = height // PAD_SHARE, width // PAD_SHARE
    dy, dx = offsets[:, 0, None, None], offsets[:, 1, None, None]
    padded = F.pad(images, (pad_x, pad_x, pad_y, pad_y))
    rows = dy + torch.arange(height)[:, None]
    columns = dx + torch.arange(width)
    # One gather over flattened planes: over four times faster than indexing by row and column.
    positions = (rows * padded.shape[3] + columns).flatten(1)[:, None].expand(-1, channels, -1)
    return padded.flatten(2).gather(2, positions).reshape(images.shape)


def _draw_sides(n: int, _size: tuple[int, int], generator: Generator) -> Tensor:
    return torch.randint(0, 2, (n,), generator=generator).bool()


def _mirror(images: Tensor, chosen: Tensor) -> Tensor:
    flipped = images.clone()
    flipped[chosen] = images[chosen].flip(3)
    return flipped


crop = Augmentation(_draw_offsets, _shift)
"""Shifts each image by its own random offset, with zeros (black) moving in."""

flip = Augmentation(_draw_sides, _mirror)
"""Mirrors each image left to right with probability one half."""


def _as_they_are(images: Tensor, _: Tensor) -> Tensor:
    return images


random_resized_crop = Augmentation(draw_crops, _as_they_are, encoded=True)
"""A part of the image as it was stored, 0.08 to 1 of its area and 3:4 to 4:3, resized: ImageNet's usual one."""

AUGMENTATIONS: Mapping[str, Augmentation] = MappingProxyType(
    {"crop": crop, "flip": flip, "random_resized_crop": random_resized_crop}
)
"""What `data.augment` may name."""


def find_augmentations(names: Sequence[str]) -> tuple[Augmentation, ...]:
    """The augmentations of `names`, in order.

    Raises:
        DataError: a name is not in `AUGMENTATIONS`, or one that works on encoded images is not the first.
    """
    for name in names:
        if name not in AUGMENTATIONS:
            raise DataError(f"data.augment has {name!r}, wanted names among {', '.join(AUGMENTATIONS)}")
    for name in names[1:]:
        if AUGMENTATIONS[name].encoded:
            raise DataError(f"data.augment is {list(names)}, wanted {name} first: it is done as an image is decoded")
    return tuple(AUGMENTATIONS[name] for name in names)


def augment(images: Tensor, names: Sequence[str], generator: Generator) -> Tensor:
    """Applies the augmentations called `names` one after the other.

    Raises:
        DataError: a name is not in `AUGMENTATIONS`.
    """
    for augmentation in find_augmentations(names):
        images = augmentation(images, generator)
    return images
