"""The order of a stream: a permutation that a buffer of the stated size can give, and never more held than that."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Generator

from edgeqat.data.share import Request, Share
from edgeqat.data.sizing import Sizing
from edgeqat.data.streamed import StreamedSplit, buffered


class Counted:
    """Shards whose samples are their own numbers, and how many of them were read."""

    def __init__(self, counts: Sequence[int]) -> None:
        self.counts, self.files, self.read = counts, [Path(str(number)) for number in range(len(counts))], 0

    def walk(self, chosen: Sequence[int]) -> Iterator[Any]:
        for shard in chosen:
            for row in range(self.counts[shard]):
                self.read += 1
                yield sum(self.counts[:shard]) + row


def split_of(counts: Sequence[int], indices: Sequence[int], buffer: int) -> tuple[StreamedSplit, Counted]:
    shards, numbers = Counted(counts), torch.tensor(indices, dtype=torch.int64)
    return StreamedSplit("x", shards, numbers, numbers, Sizing(4), 0, shards, buffer), shards  # type: ignore[arg-type]


@given(n=st.integers(0, 60), size=st.integers(1, 20), seed=st.integers(0, 5))
def test_a_buffer_gives_each_item_once_and_none_before_it_was_read(n: int, size: int, seed: int) -> None:
    out = buffered(range(n), size, Generator().manual_seed(seed))
    assert sorted(out) == list(range(n))
    assert all(item <= place + size for place, item in enumerate(out))
    assert out == buffered(range(n), size, Generator().manual_seed(seed))


@given(
    counts=st.lists(st.integers(0, 12), min_size=1, max_size=6).filter(lambda c: sum(c) > 1),
    buffer=st.integers(1, 10),
    size=st.integers(1, 7),
    ranks=st.integers(1, 3),
    within=st.booleans(),
    data=st.data(),
)
def test_every_process_reads_what_it_asks_for_and_holds_little(
    counts: list[int], buffer: int, size: int, ranks: int, within: bool, data: st.DataObject
) -> None:
    indices = sorted(data.draw(st.sets(st.integers(0, sum(counts) - 1), min_size=1)))
    split, shards = split_of(counts, indices, buffer)
    order = split.order(Generator().manual_seed(3))
    assert sorted(order.tolist()) == list(range(len(indices)))
    share = Share(data.draw(st.integers(0, ranks - 1)), ranks, within)
    batches = list(torch.split(order, size))
    own = share.of_batches(len(batches))
    own = own[data.draw(st.integers(0, len(own))) :]
    requests = [Request(batches[number], share.of_batch(len(batches[number]))) for number in own]
    asked = 0
    for request, items in split._items(order, iter(requests)):
        assert [item for _, item in items] == split.indices[request.chosen].tolist()
        asked = int((order == request.chosen[-1]).nonzero()) + 1
        # Rows of other splits are read as well, at most all of them.
        assert shards.read <= asked + buffer + size + sum(counts) - len(indices) + max(counts)


def test_shards_change_places_and_a_small_buffer_keeps_them_together() -> None:
    split, _ = split_of([10] * 8, range(80), 5)
    orders = [split.order(Generator().manual_seed(seed)) for seed in range(4)]
    assert len({tuple(order.tolist()) for order in orders}) == 4
    for order in orders:
        assert len(set((order[:6] // 10).tolist())) <= 2
    assert split.order(None).tolist() == list(range(80))
