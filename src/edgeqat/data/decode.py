"""Encoded images become RGB pixels of one size, in memory that was found to be there first.

What is held in memory is decoded once: at 32x32 a training epoch is bound by the model, not by JPEG.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from edgeqat.data.corrupt import Skipped
from edgeqat.data.sizing import Pixels, Sizing
from edgeqat.errors import DataError
from edgeqat.launch import processes_here
from edgeqat.machine import available_memory

__all__ = ["CHANNELS", "allocate", "bytes_of_cell", "decode", "decode_files", "read_file", "require_memory"]

CHANNELS = 3
EIGHT_BIT_MODES = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"})
"""Pillow modes that convert to RGB faithfully; it clips 16-bit and float images to 255 without a word."""
COPIES = 2
"""A part of a source is held twice while it is split."""


def require_memory(what: str, n_bytes: int) -> None:
    """Refuses what cannot fit, before it is allocated: the system would end the process without a word.

    Raises:
        DataError: `n_bytes`, held as often as splitting needs, are more than the memory that is free.
    """
    free = available_memory()
    needed = COPIES * n_bytes * processes_here()
    if free is not None and needed > free:
        raise DataError(
            f"{what} needs {needed / 1e9:.3g} GB in memory, but {free / 1e9:.3g} GB are free; "
            "lower data.image_size, use fewer samples, or set data.storage to disk"
        )


def allocate(what: str, n: int, image_size: int) -> tuple[Tensor, Pixels]:
    """uint8 [n, 3, S, S], and a view of it as [n, S, S, 3], which is how Pillow gives pixels.

    Raises:
        DataError: it does not fit into memory; `what` names it.
    """
    require_memory(what, n * CHANNELS * image_size**2)
    images = torch.empty(n, CHANNELS, image_size, image_size, dtype=torch.uint8)
    return images, images.numpy().transpose(0, 2, 3, 1)


def decode_files(what: str, files: Sequence[Path], sizing: Sizing, skipped: Skipped) -> tuple[Tensor, list[int]]:
    """Image files as uint8 [N, 3, S, S], and which of the files these are.

    Raises:
        DataError: more files than may be skipped cannot be read or decoded, or all of them do not fit into memory.
    """
    images, view = allocate(what, len(files), sizing.side)
    kept: list[int] = []
    for index, file in enumerate(files):
        try:
            view[len(kept)] = decode(str(file), read_file(file), sizing)
        except DataError as error:
            skipped.add(str(file), str(error))
        else:
            kept.append(index)
    return images[: len(kept)], kept


def read_file(file: Path) -> bytes:
    """A file's bytes.

    Raises:
        DataError: it cannot be read.
    """
    try:
        return file.read_bytes()
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise DataError(f"{file} cannot be read ({reason}); repair or remove it") from error


def bytes_of_cell(what: str, cell: object) -> bytes:
    """The encoded image in one cell of a table, {bytes, path} or plain bytes.

    Raises:
        DataError: it holds none.
    """
    data = cell
    if isinstance(cell, Mapping):
        data, path = cell.get("bytes"), cell.get("path")
        if data is None and isinstance(path, str) and Path(path).is_file():
            data = read_file(Path(path))
    if not isinstance(data, bytes):
        raise DataError(f"{what} holds no bytes, wanted an encoded image in {{bytes, path}}")
    return data


def decode(what: str, data: bytes | Image.Image, sizing: Sizing, crop: Tensor | None = None) -> Pixels:
    """Pixels of one image: uint8 [S, S, 3].

    Args:
        what: How messages call it.
        data: The image, encoded or open.
        sizing: How it comes to its size.
        crop: A row of `draw_crops`, for a random part of it.

    Raises:
        DataError: it cannot be decoded, or has more than 8 bits a channel.
    """
    try:
        with data.copy() if isinstance(data, Image.Image) else Image.open(io.BytesIO(data)) as image:
            mode, rgb = image.mode, None
            if mode in EIGHT_BIT_MODES:
                rgb = sizing.apply(image) if crop is None else sizing.apply_crop(image, crop)
    except Exception as error:
        # Pillow's decoders raise whatever a broken file makes them trip over: EOFError, struct.error, IndexError.
        raise DataError(f"{what} cannot be decoded, wanted PNG, JPEG or the like; replace it") from error
    if rgb is None:
        raise DataError(f"{what} has Pillow mode {mode}, wanted 8 bits a channel; convert it")
    return rgb
