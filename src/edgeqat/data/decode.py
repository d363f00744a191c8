"""Encoded images become RGB pixels of one size, in memory that was found to be there first.

Everything is decoded once: at 32x32 a training epoch is bound by the model, not by JPEG.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from edgeqat.errors import DataError
from edgeqat.machine import available_memory

__all__ = ["CHANNELS", "Pixels", "allocate", "decode", "decode_cell", "decode_files", "require_memory", "to_rgb"]

CHANNELS = 3
EIGHT_BIT_MODES = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"})
"""Pillow modes that convert to RGB faithfully; it clips 16-bit and float images to 255 without a word."""
COPIES = 2
"""A part of a source is held twice while it is split."""

Pixels: TypeAlias = npt.NDArray[np.uint8]


def require_memory(what: str, n_bytes: int) -> None:
    """Refuses what cannot fit, before it is allocated: the system would end the process without a word.

    Raises:
        DataError: `n_bytes`, held as often as splitting needs, are more than the memory that is free.
    """
    free = available_memory()
    if free is not None and COPIES * n_bytes > free:
        raise DataError(
            f"{what} needs {COPIES * n_bytes / 1e9:.3g} GB in memory, but {free / 1e9:.3g} GB are free; "
            "lower data.image_size or use fewer samples"
        )


def allocate(what: str, n: int, image_size: int) -> tuple[Tensor, Pixels]:
    """uint8 [n, 3, S, S], and a view of it as [n, S, S, 3], which is how Pillow gives pixels.

    Raises:
        DataError: it does not fit into memory; `what` names it.
    """
    require_memory(what, n * CHANNELS * image_size**2)
    images = torch.empty(n, CHANNELS, image_size, image_size, dtype=torch.uint8)
    return images, images.numpy().transpose(0, 2, 3, 1)


def decode_files(what: str, files: Sequence[Path], image_size: int) -> Tensor:
    """Image files as uint8 [N, 3, image_size, image_size].

    Raises:
        DataError: a file cannot be read or decoded, or all of them do not fit into memory.
    """
    images, view = allocate(what, len(files), image_size)
    for index, file in enumerate(files):
        try:
            data = file.read_bytes()
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise DataError(f"{file} cannot be read ({reason}); repair or remove it") from error
        view[index] = decode(str(file), data, image_size)
    return images


def decode_cell(what: str, cell: object, image_size: int) -> Pixels:
    """Pixels of one cell of a table, {bytes, path} or plain bytes: uint8 [image_size, image_size, 3].

    Raises:
        DataError: it holds no image that can be decoded.
    """
    data = cell
    if isinstance(cell, Mapping):
        data, path = cell.get("bytes"), cell.get("path")
        if data is None and isinstance(path, str) and Path(path).is_file():
            data = Path(path).read_bytes()
    if not isinstance(data, bytes):
        raise DataError(f"{what} holds no bytes, wanted an encoded image in {{bytes, path}}")
    return decode(what, data, image_size)


def decode(what: str, data: bytes, image_size: int) -> Pixels:
    """Pixels of one encoded image: uint8 [image_size, image_size, 3].

    Raises:
        DataError: it cannot be decoded, or has more than 8 bits a channel.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            mode = image.mode
            rgb = to_rgb(image, image_size) if mode in EIGHT_BIT_MODES else None
    except Exception as error:
        # Pillow's decoders raise whatever a broken file makes them trip over: EOFError, struct.error, IndexError.
        raise DataError(f"{what} cannot be decoded, wanted PNG, JPEG or the like; replace it") from error
    if rgb is None:
        raise DataError(f"{what} has Pillow mode {mode}, wanted 8 bits a channel; convert it")
    return rgb


def to_rgb(image: Image.Image, image_size: int) -> Pixels:
    """uint8 [image_size, image_size, 3]; bilinear, and averaging when it shrinks."""
    rgb = image.convert("RGB")
    if rgb.size != (image_size, image_size):
        rgb = rgb.resize((image_size, image_size), Image.Resampling.BILINEAR)
    return np.asarray(rgb)
