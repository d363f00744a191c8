"""A split whose images are decoded when they are needed, in any order."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Generator, Tensor

from edgeqat.data.corrupt import Skipped
from edgeqat.data.dataset import Split, classes_of, samples_at
from edgeqat.data.decode import CHANNELS, bytes_of_cell, decode, require_memory
from edgeqat.data.loading import IN_PROCESS, Decoded, Loading, Work, decode_all
from edgeqat.data.readers import Reader
from edgeqat.data.share import Request
from edgeqat.data.sizing import Pixels, Sizing
from edgeqat.errors import DataError

__all__ = ["StoredSplit"]

READ_BATCH = 256
"""Samples that are decoded at a time where they are to be held in memory, or only looked at."""

Item = tuple[str, Any]
"""A sample to be decoded: its name, and its number in the reader or, in a stream, the cell that holds it."""


@dataclass(frozen=True, eq=False)
class StoredSplit:
    """Samples of a reader.

    Attributes:
        what: How messages call it.
        reader: Where they are.
        indices: Which of the reader's they are, int64 [N].
        targets: Theirs, in memory.
        sizing: How they come to their size.
        max_corrupt: How many that cannot be read may be skipped, in a load or an epoch.
    """

    what: str
    reader: Reader
    indices: Tensor
    targets: Any
    sizing: Sizing
    max_corrupt: int

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def inputs(self) -> Tensor:
        """Not in memory."""
        raise DataError(f"{self.what} is not in memory; read it through Batches, or take() some of it")

    @property
    def classes(self) -> Tensor | None:
        """The targets where they are classes; else None."""
        return classes_of(self.targets)

    @property
    def image_inputs(self) -> list[Tensor]:
        """None of its images is in memory."""
        return []

    @property
    def image_size(self) -> tuple[int, int] | None:
        """What they are decoded to."""
        return self.sizing.side, self.sizing.side

    @property
    def encoded(self) -> bool:
        """They are decoded as they are read."""
        return True

    def subset(self, indices: Tensor) -> StoredSplit:
        """The samples at `indices`, where they are."""
        return replace(self, indices=self.indices[indices], targets=samples_at(self.targets, indices))

    def labelled(self, targets: Any) -> StoredSplit:
        """The same inputs with other targets."""
        return replace(self, targets=targets)

    def identity(self) -> Any:
        """Names, sizes and targets; not what is in 150 GB of images."""
        return self.reader.identity(), self.indices, self.targets, self.sizing

    def blank(self) -> Any:
        """One image, all black."""
        return torch.zeros(1, CHANNELS, self.sizing.side, self.sizing.side, dtype=torch.uint8)

    def order(self, generator: Generator | None) -> Tensor:
        """A permutation, or 0 .. N - 1."""
        return torch.arange(len(self)) if generator is None else torch.randperm(len(self), generator=generator)

    def take(self, indices: Tensor) -> Split:
        """The samples at `indices` in memory, in that order, but for those that cannot be read.

        Raises:
            DataError: more than may be skipped cannot be read, or they do not fit into memory.
        """
        require_memory(self.what, len(indices) * CHANNELS * self.sizing.side**2)
        ordered, origin = indices.sort()  # as they are stored; a stream has no other order
        taken = self.subset(ordered)
        none = torch.zeros(0, dtype=torch.int64)
        images, kept = [torch.zeros(0, CHANNELS, self.sizing.side, self.sizing.side, dtype=torch.uint8)], [none]
        for found, good in taken._readable(IN_PROCESS):
            images.append(found)
            kept.append(good)
        chosen = torch.cat(kept)
        back = origin[chosen].argsort()
        return Split(torch.cat(images)[back], samples_at(taken.targets, chosen[back]))

    def checked(self, loading: Loading) -> StoredSplit:
        """Itself without the samples that cannot be read; it looks only where some may be skipped.

        Raises:
            DataError: more than may be skipped cannot be read.
        """
        if self.max_corrupt == 0:
            return self
        kept = [good for _, good in self._readable(loading)]
        return self.subset(torch.cat(kept)) if kept else self

    def _readable(self, loading: Loading) -> Iterator[tuple[Tensor, Tensor]]:
        """READ_BATCH at a time those that can be read: images, and which of the split's samples they are."""
        skipped, order = Skipped(self.what, self.max_corrupt), torch.arange(len(self))
        requests = (Request(part, slice(0, len(part))) for part in torch.split(order, READ_BATCH))
        for request, items, decoded in self._decoded(order, requests, loading):
            good = torch.ones(len(items), dtype=torch.bool)
            for place, reason in decoded.failures:
                skipped.add(items[place][0], reason)
                good[place] = False
            yield decoded.images[good], request.chosen[good]
        skipped.tell()

    def read(self, order: Tensor, requests: Iterable[Request], loading: Loading) -> Iterator[tuple[Any, Any]]:
        """(images, targets) of each request.

        The place of a sample that cannot be read is taken by the next of its batch that can, with its own target.

        Raises:
            DataError: more than may be skipped cannot be read, or a worker hangs or has died.
        """
        skipped = Skipped(self.what, self.max_corrupt)
        for request, items, decoded in self._decoded(order, requests, loading):
            used = request.chosen[request.own].clone()
            for place, reason in decoded.failures:
                position = place + request.own.start
                skipped.add(items[position][0], reason)
                other, pixels = self._stand_in(items, request, position, skipped)
                decoded.images[place] = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
                used[place] = request.chosen[other]
            yield decoded.images, samples_at(self.targets, used)
        skipped.tell()

    def _stand_in(
        self, items: Sequence[Item], request: Request, position: int, skipped: Skipped
    ) -> tuple[int, Pixels]:
        """The next sample of the whole batch that can be read, so that it is the same on every process."""
        crop = None if request.crops is None else request.crops[position]
        for step in range(1, len(items)):
            candidate = (position + step) % len(items)
            try:
                return candidate, self._decode(items[candidate], crop)
            except DataError as error:
                skipped.add(items[candidate][0], str(error))
        raise DataError(f"{self.what}: none of the {len(items)} samples of a batch can be read; repair the data")

    def _decoded(
        self, order: Tensor, requests: Iterable[Request], loading: Loading
    ) -> Iterator[tuple[Request, Sequence[Item], Decoded]]:
        """Each request, the items of its whole batch, and what became of its own part."""
        waiting: deque[tuple[Request, Sequence[Item]]] = deque()

        def works() -> Iterator[Work]:
            for request, items in self._items(order, requests):
                waiting.append((request, items))
                yield Work(list(items[request.own]), None if request.crops is None else request.crops[request.own])

        for decoded in decode_all(self.what, works(), self._decode, self.sizing.side, loading):
            request, items = waiting.popleft()
            yield request, items, decoded

    def _items(self, order: Tensor, requests: Iterable[Request]) -> Iterator[tuple[Request, Sequence[Item]]]:
        """The items of each request's whole batch."""
        for request in requests:
            numbers = self.indices[request.chosen].tolist()
            yield request, [(self.reader.name(number), number) for number in numbers]

    def _decode(self, item: Item, crop: Tensor | None) -> Pixels:
        name, data = item
        return decode(
            name, self.reader.read(data) if isinstance(data, int) else bytes_of_cell(name, data), self.sizing, crop
        )
