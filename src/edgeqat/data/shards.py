"""Tar shards in WebDataset's layout: `key.jpg` beside `key.cls`, or `key.json` that holds a label.

They are indexed once, by their headers and labels, so that afterwards a sample is one read.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from edgeqat.errors import DataError
from edgeqat.recipe_numbers import LARGEST

__all__ = ["ShardIndex", "index_shards"]

LABEL, JSON = "cls", "json"
IMAGES = ("jpg", "jpeg", "png", "webp", "ppm", "bmp")


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """Where the samples of some shards are; row i of every array is sample i.

    Attributes:
        shards: The files, in order.
        counts: Samples of each.
        places: int64 [N, 3]: number of the shard, offset and size of the image in it.
        keys: Their keys one after the other, as bytes, and where each ends: [N].
        labels: int64 [N].
    """

    shards: tuple[Path, ...]
    counts: tuple[int, ...]
    places: npt.NDArray[np.int64]
    keys: tuple[bytes, npt.NDArray[np.int64]]
    labels: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.places)

    def place(self, index: int) -> tuple[int, int, int]:
        """(shard, offset, size)."""
        shard, offset, size = self.places[index].tolist()
        return shard, offset, size

    def key(self, index: int) -> str:
        """What its members are called before the extension."""
        names, ends = self.keys
        return names[0 if index == 0 else ends[index - 1] : ends[index]].decode(errors="replace")

    def name(self, index: int) -> str:
        """Shard and key."""
        return f"{self.shards[self.places[index, 0]]}: {self.key(index)}"

    def identity(self) -> Any:
        """For a fingerprint: names, places and sizes."""
        return [shard.name for shard in self.shards], torch.from_numpy(self.places), self.keys[0]


def index_shards(what: str, shards: Sequence[Path]) -> ShardIndex:
    """Reads the headers and the labels of tar shards.

    Raises:
        DataError: a shard cannot be read or is cut short, or a sample has no image, no label or several.
    """
    rows: list[tuple[int, int, int]] = []
    labels: list[int] = []
    counts: list[int] = []
    names, ends = bytearray(), []
    for number, shard in enumerate(shards):
        before = len(rows)
        for sample in _samples(shard):
            offset, size, label = sample.checked(shard)
            rows.append((number, offset, size))
            labels.append(label)
            names += sample.key.encode(errors="replace")
            ends.append(len(names))
        counts.append(len(rows) - before)
    if not rows:
        raise DataError(f"{what} holds no samples, wanted key.jpg and key.cls; fill or remove it")
    places = np.asarray(rows, dtype=np.int64)
    keys = bytes(names), np.asarray(ends, dtype=np.int64)
    return ShardIndex(tuple(shards), tuple(counts), places, keys, np.asarray(labels, dtype=np.int64))


LABEL_BYTES = 2**20
"""What is read of a member that tells a label."""


@dataclass
class _Sample:
    key: str
    images: list[tuple[str, int, int]]
    labels: list[int]

    def checked(self, shard: Path) -> tuple[int, int, int]:
        """(offset, size, label)."""
        for what, found in (("image", self.images), ("label", self.labels)):
            if len(found) != 1:
                raise DataError(
                    f"{shard}: {self.key} has {len(found)} {what}s, wanted one: {self.key}.{IMAGES[0]} beside "
                    f"{self.key}.{LABEL} or {self.key}.{JSON}; write the shard again"
                )
        _, offset, size = self.images[0]
        return offset, size, self.labels[0]


def _samples(shard: Path) -> Iterator[_Sample]:
    """Members that follow each other under one key, which ends at the first dot of the name, are a sample."""
    current: _Sample | None = None
    try:
        # "r:" opens no compressed archive: in one of those nothing has a place.
        with tarfile.open(shard, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # it would keep all of them
                if not member.isreg() or member.issparse():  # what a sparse one holds has no one place
                    continue
                folder, slash, file = member.name.rpartition("/")
                stem, dot, extension = file.partition(".")
                if not stem or not dot:
                    continue
                key = folder + slash + stem
                if current is None or current.key != key:
                    if current is not None:
                        yield current
                    current = _Sample(key, [], [])
                _add(shard, tar, member, extension.lower(), current)
            _check_end(shard, tar.offset)
    except (OSError, tarfile.TarError) as error:
        raise DataError(f"{shard} cannot be read as a tar shard ({error}); fetch it again") from error
    if current is not None:
        yield current


def _check_end(shard: Path, offset: int) -> None:
    """Refuses a shard that does not end as it was written: tarfile takes a damaged header for the end."""
    with shard.open("rb") as file:
        file.seek(offset)
        block = file.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE or any(block):
        raise DataError(f"{shard} is damaged or cut short at byte {offset}; fetch it again")


def _add(shard: Path, tar: tarfile.TarFile, member: tarfile.TarInfo, extension: str, sample: _Sample) -> None:
    if extension in IMAGES:
        sample.images.append((extension, member.offset_data, member.size))
    elif extension in (LABEL, JSON):
        opened = tar.extractfile(member)
        text = b"" if opened is None else opened.read(LABEL_BYTES)
        label = _label(extension, text)
        if label is None and extension == LABEL:
            raise DataError(
                f"{shard}: {member.name} holds {text[:20]!r}, wanted a class number such as 7; write the shard again"
            )
        if label is not None:  # a JSON file may describe a sample and hold no label
            sample.labels.append(label)


def _label(extension: str, text: bytes) -> int | None:
    try:
        if extension == LABEL:
            label: Any = int(text)
        else:
            found = json.loads(text)
            label = found.get("label") if isinstance(found, dict) else None
    except (ValueError, RecursionError):
        return None
    fits = isinstance(label, int) and not isinstance(label, bool) and abs(label) <= LARGEST
    return label if fits else None
