"""A split that is read shard by shard, in order, through the datasets library: for storage without random access.

Which sample comes when is worked out from the shards' counts alone, before anything is read: a shuffled order of
shards, and a buffer to draw from. So an epoch can be gone into at any sample, and every process knows the whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Generator, Tensor

from edgeqat.data.dataset import samples_at
from edgeqat.data.share import Request
from edgeqat.data.stored import Item, StoredSplit
from edgeqat.errors import DataError

__all__ = ["Shards", "StreamedSplit", "buffered"]


class Shards(Protocol):
    """Shards that are read from their beginning."""

    @property
    def files(self) -> Sequence[Path]:
        """The shards."""
        ...

    @property
    def counts(self) -> Sequence[int]:
        """Samples of each."""
        ...

    def walk(self, chosen: Sequence[int]) -> Iterator[Any]:
        """The cells of all samples of the chosen shards, one shard after the other.

        Raises:
            DataError: a shard cannot be read.
        """
        ...


@dataclass(frozen=True, eq=False)
class StreamedSplit(StoredSplit):
    """Samples of shards; its own order is theirs.

    Attributes:
        shards: What is read; its samples are numbered one shard after the other.
        buffer: How many samples are held, undecoded, to draw the next ones from.
    """

    shards: Shards
    buffer: int

    def subset(self, indices: Tensor) -> StreamedSplit:
        """The samples at `indices`, in the order of the shards."""
        ordered = indices.sort().values
        return replace(self, indices=self.indices[ordered], targets=samples_at(self.targets, ordered))

    def order(self, generator: Generator | None) -> Tensor:
        """Shards in a random order, and a buffer; without a generator as they come."""
        if generator is None:
            return torch.arange(len(self))
        ends = np.cumsum(self.shards.counts)
        # Positions of the split's samples that are in each shard.
        bounds = np.searchsorted(self.indices.numpy(), np.concatenate([[0], ends])).tolist()
        shuffled = torch.randperm(len(ends), generator=generator).tolist()
        sequence = list(chain.from_iterable(range(bounds[shard], bounds[shard + 1]) for shard in shuffled))
        return torch.tensor(buffered(sequence, self.buffer, generator), dtype=torch.int64)

    def _items(self, order: Tensor, requests: Iterable[Request]) -> Iterator[tuple[Request, Sequence[Item]]]:
        position = torch.empty_like(order)
        position[order] = torch.arange(len(order))
        waiting: dict[int, Item] = {}
        walk: Iterator[tuple[int, Item]] | None = None
        for request in requests:
            start = int(position[request.chosen[0]])
            walk = self._walk(position, start) if walk is None else walk
            for passed in [place for place in waiting if place < start]:  # of batches that other processes take
                del waiting[passed]
            for place in range(start, start + len(request.chosen)):
                while place not in waiting:
                    found, item = next(walk)
                    waiting[found] = item
            yield request, [waiting.pop(place) for place in range(start, start + len(request.chosen))]

    def _walk(self, position: Tensor, first: int) -> Iterator[tuple[int, Item]]:
        """(place in the epoch, item) of every sample whose place is `first` or later, as they are read."""
        counts = np.asarray(self.shards.counts)
        starts = np.cumsum(counts) - counts
        places = np.full(int(counts.sum()), -1, dtype=np.int64)
        places[self.indices.numpy()] = position.numpy()
        places[places < first] = -1
        wanted = {}
        for shard, (start, count) in enumerate(zip(starts.tolist(), counts.tolist(), strict=True)):
            own = places[start : start + count]
            own = own[own >= 0]
            if len(own):
                wanted[shard] = int(own.min())
        chosen = sorted(wanted, key=wanted.__getitem__)  # the one that is needed first is read first
        cells = self.shards.walk(chosen)
        for shard in chosen:
            for row in range(counts[shard]):
                name = f"{self.shards.files[shard]}: sample {row}"
                try:
                    cell = next(cells)
                except StopIteration:
                    raise DataError(
                        f"{name} is missing, of {counts[shard]} when it was opened; load it again"
                    ) from None
                place = int(places[starts[shard] + row])
                if place >= 0:
                    yield place, (name, cell)


def buffered(sequence: Sequence[int], size: int, generator: Generator) -> list[int]:
    """The sequence as it leaves a buffer of `size` that is kept full and from which one at random is taken."""
    n = len(sequence)
    held = list(sequence[:size])
    picks = torch.randint(0, max(size, 1), (n,), generator=generator).tolist()
    out = []
    for pick, item in zip(picks, sequence[size:], strict=False):
        out.append(held[pick])
        held[pick] = item
    rest = torch.randperm(len(held), generator=generator).tolist()
    return out + [held[place] for place in rest]
