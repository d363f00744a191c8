"""All processes together see what one alone would, from any batch on."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeqat.data.batches import Batches
from edgeqat.data.dataset import Split
from edgeqat.data.share import Share
from edgeqat.errors import DataError

MEAN, STD = (0.5, 0.25, 0.125), (0.5, 0.25, 2.0)


def make(n: int, size: int, share: Share, seed: int = 0, epoch: int = 0, drop_last: bool = False) -> Batches:
    images = torch.randint(0, 256, (n, 3, 8, 9), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    batches = Batches(
        Split(images, torch.arange(n)),
        batch_size=size,
        mean=MEAN,
        std=STD,
        augment=("crop", "flip"),
        shuffle=True,
        seed=seed,
        drop_last=drop_last,
        share=share,
    )
    batches.set_epoch(epoch)
    return batches


sizes = {
    "n": st.integers(1, 40),
    "size": st.integers(1, 12),
    "ranks": st.integers(1, 7),
    "seed": st.integers(0, 3),
    "epoch": st.integers(0, 3),
}


@settings(max_examples=60, deadline=None)
@given(**sizes)
def test_parts_of_every_batch_make_the_batch(n: int, size: int, ranks: int, seed: int, epoch: int) -> None:
    alone = make(n, size, Share(), seed, epoch)
    shares = [make(n, size, Share(rank, ranks), seed, epoch) for rank in range(ranks)]
    assert {len(batches) for batches in shares} == {len(alone)}
    for number, ((x, y), *parts) in enumerate(zip(alone, *shares, strict=True)):
        weights = [batches.weight_of(number) for batches in shares]
        real = [part for part, weight in zip(parts, weights, strict=True) if weight > 0]
        assert torch.equal(torch.cat([inputs for inputs, _ in real]), x)
        assert torch.equal(torch.cat([targets for _, targets in real]), y)
        for (inputs, targets), weight, batches in zip(parts, weights, shares, strict=True):
            assert weight == pytest.approx((weight > 0) * len(targets) * ranks / len(y))
            assert torch.equal(batches.samples_of(number), targets)  # a sample's target is its index
            if weight == 0:
                assert torch.equal(inputs, x[:1])
                assert torch.equal(targets, y[:1])
        assert sum(weights) == pytest.approx(ranks)


@settings(max_examples=60, deadline=None)
@given(**sizes)
def test_whole_batches_are_dealt_out_once(n: int, size: int, ranks: int, seed: int, epoch: int) -> None:
    expected = list(make(n, size, Share(), seed, epoch))
    dealt = [make(n, size, Share(rank, ranks, within=False), seed, epoch) for rank in range(ranks)]
    assert sum(len(batches) for batches in dealt) == len(expected)
    for rank, batches in enumerate(dealt):
        own = list(batches)
        assert len(own) == len(batches)
        for number, ((x, y), (want_x, want_y)) in enumerate(zip(own, expected[rank::ranks], strict=True)):
            assert torch.equal(x, want_x)
            assert torch.equal(y, want_y)
            assert torch.equal(batches.samples_of(number), y)
            assert batches.weight_of(number) == 1.0


@settings(max_examples=60, deadline=None)
@given(**sizes, within=st.booleans(), drop_last=st.booleans(), data=st.data())
def test_an_epoch_goes_on_from_any_batch(
    n: int, size: int, ranks: int, seed: int, epoch: int, within: bool, drop_last: bool, data: st.DataObject
) -> None:
    share = Share(data.draw(st.integers(0, ranks - 1)), ranks, within)
    batches = make(n, size, share, seed, epoch, drop_last and n >= size)
    whole = list(batches)
    first = data.draw(st.integers(0, len(batches)))
    rest = list(batches.from_batch(first))
    assert len(rest) == len(whole) - first
    for (x, y), (want_x, want_y) in zip(rest, whole[first:], strict=True):
        assert torch.equal(x, want_x)
        assert torch.equal(y, want_y)


def test_equal_shares_weigh_one() -> None:
    assert [make(24, 8, Share(rank, 4)).weight_of(1) for rank in range(4)] == [1.0] * 4


def test_the_stream_of_random_figures_is_the_one_that_published_results_were_made_with() -> None:
    """The batches of an earlier version: images moved by crop and flip, order, targets."""
    images = torch.arange(6 * 3 * 8 * 8).reshape(6, 3, 8, 8).remainder(251).to(torch.uint8)
    batches = Batches(
        Split(images, torch.arange(6)),
        batch_size=4,
        mean=MEAN,
        std=STD,
        augment=("crop", "flip"),
        shuffle=True,
        seed=3,
        pixels=True,
    )
    batches.set_epoch(1)
    found = [(targets.tolist(), inputs[:, 0, 4, 4].tolist()) for inputs, targets in batches]
    assert found == EARLIER


EARLIER = [([5, 1, 2, 0], [0, 218, 160, 29]), ([4, 3], [42, 117])]


@pytest.mark.parametrize(("rank", "ranks"), [(-1, 2), (2, 2), (0, 0)])
def test_shares_that_do_not_exist(rank: int, ranks: int) -> None:
    with pytest.raises(DataError, match=f"a share of rank {rank} among {ranks}"):
        Share(rank, ranks)


@pytest.mark.parametrize("first", [-1, 4])
def test_a_batch_to_begin_with_that_does_not_exist(first: int) -> None:
    with pytest.raises(DataError, match=f"found batch {first} to begin with, wanted 0 to 3"):
        make(10, 4, Share()).from_batch(first)
