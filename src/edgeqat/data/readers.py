"""Encoded samples at random access: files, members of tar shards, rows of a memory-mapped table, a user's dataset."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from edgeqat.callables import USER_ERRORS
from edgeqat.data.dataset import describe
from edgeqat.data.decode import CHANNELS, bytes_of_cell, read_file
from edgeqat.data.shards import ShardIndex
from edgeqat.errors import DataError

__all__ = ["FileReader", "Names", "PairReader", "Reader", "TableReader", "TarReader"]

MOST_OPEN = 100
"""Shards that a process keeps open: systems allow as few as 256 files."""


class Reader(Protocol):
    """Samples by number; a worker process gets a copy."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """How messages call a sample."""
        ...

    def read(self, index: int) -> bytes | Image.Image:
        """A sample, encoded or as an image.

        Raises:
            DataError: it cannot be read.
        """
        ...

    def identity(self) -> Any:
        """What tells these samples from others, for a fingerprint."""
        ...


class Names:
    """Many names in one array: a list of them would be copied by every worker that looks at it."""

    def __init__(self, names: Sequence[str]) -> None:
        encoded = [os.fsencode(name) for name in names]
        self._bytes = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        self._ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        start = 0 if index == 0 else int(self._ends[index - 1])
        return os.fsdecode(self._bytes[start : int(self._ends[index])].tobytes())

    def identity(self) -> Any:
        """For a fingerprint."""
        return torch.from_numpy(self._bytes.copy()), torch.from_numpy(self._ends)


class FileReader:
    """Image files below a folder."""

    def __init__(self, folder: Path, files: Sequence[Path]) -> None:
        self._folder = folder
        self._names = Names([str(file.relative_to(folder)) for file in files])
        self._sizes = torch.tensor([_size(file) for file in files], dtype=torch.int64)

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        """Its path."""
        return str(self._folder / self._names[index])

    def read(self, index: int) -> bytes:
        """Its bytes."""
        return read_file(self._folder / self._names[index])

    def identity(self) -> Any:
        """Names and sizes, wherever the folder is."""
        return self._names.identity(), self._sizes


class TarReader:
    """Members of tar shards, each read at its place."""

    def __init__(self, index: ShardIndex) -> None:
        self._index = index
        self._open: dict[tuple[int, int], int] = {}

    def __len__(self) -> int:
        return len(self._index)

    def name(self, index: int) -> str:
        """Shard and key."""
        return self._index.name(index)

    def read(self, index: int) -> bytes:
        """Its bytes."""
        shard, offset, size = self._index.place(index)
        try:
            data = os.pread(self._descriptor(shard), size, offset)
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise DataError(f"{self.name(index)} cannot be read ({reason}); fetch the shard again") from error
        if len(data) != size:
            raise DataError(f"{self.name(index)} has {len(data)} of {size} bytes; fetch the shard again")
        return data

    def identity(self) -> Any:
        """Names, places and sizes in the shards."""
        return self._index.identity()

    def _descriptor(self, shard: int) -> int:
        key = (os.getpid(), shard)  # one that a worker process has inherited is its parent's to close
        if key not in self._open:
            own = [opened for opened in self._open if opened[0] == key[0]]
            if len(own) >= MOST_OPEN:
                os.close(self._open.pop(own[0]))
            self._open[key] = os.open(self._index.shards[shard], os.O_RDONLY | os.O_CLOEXEC)
        return self._open[key]

    def __del__(self) -> None:
        for (process, _), descriptor in self._open.items():
            if process == os.getpid():
                os.close(descriptor)


class TableReader:
    """Rows of a datasets.Dataset, which the library maps into memory."""

    def __init__(self, what: str, table: Any, image_column: str) -> None:
        self._what, self._table, self._column = what, table.select_columns([image_column]), image_column

    def __len__(self) -> int:
        return len(self._table)

    def name(self, index: int) -> str:
        """Its number."""
        return f"{self._what}: image {index}"

    def read(self, index: int) -> bytes:
        """The bytes in its cell."""
        return bytes_of_cell(self.name(index), self._table[index][self._column])

    def identity(self) -> Any:
        """The library's own fingerprint would change with every version of it, and with where the table lies."""
        return self._what, len(self._table)


class PairReader:
    """A user's map-style dataset of (image, target): an encoded or open image, or uint8 pixels [3, H, W]."""

    def __init__(self, what: str, pairs: Any) -> None:
        self._what, self._pairs = what, pairs

    def __len__(self) -> int:
        return len(self._pairs)

    def name(self, index: int) -> str:
        """Its number."""
        return f"{self._what}: sample {index}"

    def read(self, index: int) -> bytes | Image.Image:
        """What the dataset gives."""
        try:
            found = self._pairs[index][0]
        except USER_ERRORS as error:
            # The user's code may raise anything.
            raise DataError(f"{self.name(index)} failed: {type(error).__name__}: {error}") from error
        if isinstance(found, (bytes, Image.Image)):
            return found
        pixels: Any = found.numpy() if isinstance(found, Tensor) else found
        if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape[:1] != (CHANNELS,):
            raise DataError(
                f"{self.name(index)} holds {describe(found)}, wanted an encoded image, one of Pillow's, or uint8 "
                f"[{CHANNELS}, H, W]"
            )
        rgb: npt.NDArray[np.uint8] = pixels.transpose(1, 2, 0)
        return Image.fromarray(np.ascontiguousarray(rgb))

    def identity(self) -> Any:
        """Nothing but its length is known without reading it."""
        return self._what, len(self._pairs)


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:  # a link to nothing: reading it says so
        return -1
