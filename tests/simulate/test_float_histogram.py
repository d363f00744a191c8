from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edgeqat.simulate.float_histogram import FloatHistogram

FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)


def histogram_of(*batches: torch.Tensor) -> FloatHistogram:
    histogram = FloatHistogram()
    for batch in batches:
        histogram.add(batch)
    return histogram


@given(st.lists(FINITE, min_size=1, max_size=30))
def test_every_value_lies_in_the_bin_that_counts_it(values: list[float]) -> None:
    x = torch.tensor(values)
    bins = histogram_of(x).bins(float(x.min()), float(x.max()))
    assert float(bins.count.sum()) == len(values)
    assert bool((bins.low <= bins.high).all()) and bool((bins.high[:-1] <= bins.low[1:]).all())
    # The i-th smallest value belongs to the i-th count. What is too small for a bin of its own counts as zero.
    small = 2.0**-134
    ordered = x.double().sort().values
    low, high = (edge.repeat_interleave(bins.count.long()) for edge in (bins.low, bins.high))
    assert bool((low - small <= ordered).all()) and bool((ordered <= high + small).all())


def test_bins_are_a_fixed_share_of_their_values() -> None:
    x = torch.cat([torch.randn(20000), torch.tensor([1e30, -1e-30])])
    bins = histogram_of(x).bins(float(x.min()), float(x.max()))
    nearest = torch.minimum(bins.low.abs(), bins.high.abs())
    # 8 bits of mantissa: a bin is 1/256 of its lower edge wide, at most.
    assert bool((bins.high - bins.low <= nearest / 256 * (1 + 1e-12)).all())


def test_the_order_and_the_cut_into_batches_do_not_matter() -> None:
    x = torch.randn(1000) * torch.logspace(-30, 30, 1000)
    whole = histogram_of(x).counts
    assert torch.equal(histogram_of(*x[torch.randperm(1000)].split(37)).counts, whole)
    assert torch.equal(histogram_of(x[:500]).counts + histogram_of(x[500:]).counts, whole)


def test_magnitudes_join_both_signs() -> None:
    counts = histogram_of(torch.tensor([-2.0, 2.0, 2.001, 0.0, -0.0])).magnitudes()
    index = int(counts[1:].argmax()) + 1
    assert int(counts[index]) == 3 and int(counts[0]) == 2


@pytest.mark.parametrize("value", [1.0, 3.3e38, 1e-30, 6.0])
def test_the_edge_of_a_magnitude_is_at_or_below_it(value: float) -> None:
    histogram = histogram_of(torch.tensor([value]))
    index = int(histogram.magnitudes().argmax())
    assert histogram.magnitude(index) <= value < histogram.magnitude(index + 1)


def test_a_transposed_tensor_is_counted_whole() -> None:
    x = torch.arange(12.0).view(3, 4)
    assert torch.equal(histogram_of(x.t()).counts, histogram_of(x).counts)
