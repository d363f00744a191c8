"""Folders of tar shards in WebDataset's layout: train-*.tar, and test-*.tar or val-*.tar."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from edgeqat.data.dataset import Samples, Source
from edgeqat.data.readers import TarReader
from edgeqat.data.reading import Reading
from edgeqat.data.shards import IMAGES, ShardIndex, index_shards
from edgeqat.data.streamed import StreamedSplit
from edgeqat.errors import DataError

__all__ = ["TarStream", "is_tar_folder", "read_tar_folder"]

TEST_PARTS = ("test", "validation", "valid", "val")
KEY = "__key__"
"""What the library calls a sample's key."""


def is_tar_folder(folder: Path) -> bool:
    """Whether a folder is one that `read_tar_folder` reads."""
    return bool(_parts(folder))


def read_tar_folder(source: str, folder: Path, reading: Reading) -> Source:
    """Indexes the shards; reads all of them where samples are to be in memory.

    Raises:
        DataError: there is no training part, or a shard cannot be read or does not fit.
    """
    parts = _parts(folder)
    if "train" not in parts:
        raise DataError(f"{source} has the parts {', '.join(parts)}, wanted train-*.tar, and test-*.tar or val-*.tar")
    test = next((part for part in TEST_PARTS if part in parts), None)
    splits = [_split(source, part, parts[part], reading) for part in ("train", test) if part is not None]
    return Source(splits[0], splits[1] if len(splits) > 1 else None, None, sizing=reading.sizing)


def _parts(folder: Path) -> dict[str, list[Path]]:
    found = {part: sorted(folder.glob(f"{part}-*.tar")) for part in ("train", *TEST_PARTS)}
    return {part: files for part, files in found.items() if files}


def _split(source: str, part: str, files: Sequence[Path], reading: Reading) -> Samples:
    what = f"{source}: {part}-*.tar"
    index = index_shards(what, files)
    targets, reader = torch.from_numpy(index.labels), TarReader(index)
    stored = reading.stored(what, reader, targets)
    if reading.storage == "memory":
        return stored.take(torch.arange(len(stored)))
    if reading.storage == "disk":
        return stored
    stream = TarStream(index)
    return StreamedSplit(
        what, reader, stored.indices, targets, stored.sizing, stored.max_corrupt, stream, reading.shuffle_buffer
    )


class TarStream:
    """Shards read from their beginning by the library's own reader of WebDataset's layout."""

    def __init__(self, index: ShardIndex) -> None:
        self.files, self.counts, self._index = index.shards, index.counts, index

    def walk(self, chosen: Sequence[int]) -> Iterator[Any]:
        """The images of the chosen shards."""
        import datasets  # heavy: a second on its own

        files = [str(self.files[shard]) for shard in chosen]
        try:
            table = datasets.load_dataset("webdataset", data_files={"train": files}, split="train", streaming=True)
            columns = [name for name in table.features if name.lower() in IMAGES]
            for name in columns:
                if isinstance(table.features[name], datasets.Image):
                    table = table.cast_column(name, datasets.Image(decode=False))
            rows = iter(table.select_columns([KEY, *columns]))
            for number in self._numbers(chosen):
                row = next(rows)
                # The labels are those of the index: another reading of the shard would give them to other images.
                if row[KEY] != self._index.key(number):
                    raise DataError(f"{self._index.name(number)} is no longer where it was; load the data again")
                yield next((row[name] for name in columns if row[name] is not None), None)
        except DataError:
            raise
        except Exception as error:
            # The library raises whatever its readers and its HTTP client raise.
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            what = f"{files[0]} or a shard after it"
            raise DataError(f"{what} cannot be read ({reason}); fetch it again") from error

    def _numbers(self, chosen: Sequence[int]) -> Iterator[int]:
        """The samples of the chosen shards, numbered over all shards."""
        for shard in chosen:
            start = sum(self.counts[:shard])
            yield from range(start, start + self.counts[shard])
