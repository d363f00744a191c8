from __future__ import annotations

import itertools
import logging
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from edgeqat import affine
from edgeqat.simulate.float_histogram import Bins, FloatHistogram
from edgeqat.simulate.range_search import l2_range, mse_range, percentile_range, squared_error

FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
VALUES = st.lists(FINITE, min_size=1, max_size=40).map(torch.tensor)
BITS = st.sampled_from([2, 4, 8])


def bins_of(x: Tensor) -> Bins:
    histogram = FloatHistogram()
    histogram.add(x)
    return histogram.bins(float(x.min()), float(x.max()))


def real_error(x: Tensor, low: float, high: float, qmax: int) -> float:
    """The sum of squared errors on the values themselves."""
    scale, zero_point = affine.activation_qparams(low, high, 0, qmax)
    return float((affine.fake_quantize(x, scale, zero_point, 0, qmax) - x).double().square().sum())


SAMPLES = {
    "normal": torch.randn(20000, generator=torch.Generator().manual_seed(1)),
    "relu": torch.randn(20000, generator=torch.Generator().manual_seed(2)).relu(),
    "heavy tails": torch.randn(20000, generator=torch.Generator().manual_seed(3)) ** 3,
    "one-sided tail": torch.randn(20000, generator=torch.Generator().manual_seed(4)).exp(),
    "shifted": torch.randn(20000, generator=torch.Generator().manual_seed(5)) + 1.5,
    "negative": -torch.rand(20000, generator=torch.Generator().manual_seed(6)) - 0.5,
    "outlier": torch.cat([torch.randn(20000, generator=torch.Generator().manual_seed(7)), torch.tensor([100.0])]),
}


@given(VALUES, st.floats(51.0, 100.0))
def test_the_range_of_a_percentile_lies_inside_the_extremes(x: Tensor, percentile: float) -> None:
    low, high = percentile_range(bins_of(x), percentile)
    assert float(x.min()) <= low <= high <= float(x.max())


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("percentile", [99.99, 99.0, 100.0])
def test_a_percentile_clips_its_share_at_either_end(name: str, percentile: float) -> None:
    x = SAMPLES[name]
    low, high = percentile_range(bins_of(x), percentile)
    clipped = round(len(x) * (100.0 - percentile) / 100.0)
    # Where in its bin a value lies is not known: 1/256 of it, at most.
    left, right = abs(low) / 256, abs(high) / 256
    assert int((x < low - left).sum()) <= clipped <= int((x <= low + left).sum())
    assert int((x > high + right).sum()) <= clipped <= int((x >= high - right).sum())
    if percentile == 100.0:
        assert (low, high) == (float(x.min()), float(x.max()))


def test_a_percentile_ignores_one_outlier_however_large() -> None:
    x = torch.cat([SAMPLES["normal"], torch.tensor([1e30, -1e30])])
    low, high = percentile_range(bins_of(x), 99.99)
    assert -4.5 < low < -3.3 and 3.3 < high < 4.5


def test_where_nearly_all_is_zero_the_extremes_are_taken() -> None:
    x = torch.zeros(100_000)
    x[:3] = torch.tensor([1.0, 2.0, 3.0])
    assert percentile_range(bins_of(x), 99.99) == (0.0, 3.0)


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("qmax", [255, 15, 3])
def test_the_error_that_is_minimised_is_the_real_one(name: str, qmax: int) -> None:
    x = SAMPLES[name]
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    for share in (1.0, 0.6, 0.2):
        found = squared_error(bins_of(x), share * low, share * high, 0, qmax)
        # Spreading 20,000 values evenly over their bins moves the sum of their errors by a few per cent at most.
        assert found == pytest.approx(real_error(x, share * low, share * high, qmax), rel=0.05)


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("qmax", [255, 15, 3])
def test_no_range_of_a_dense_grid_is_better(name: str, qmax: int) -> None:
    x = SAMPLES[name]
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    found = real_error(x, *mse_range(bins_of(x), 0, qmax), qmax)
    shares = [i / 24 for i in range(1, 25)]
    pairs = itertools.product(shares if low < 0 else [1.0], shares if high > 0 else [1.0])
    best = min(real_error(x, a * low, b * high, qmax) for a, b in pairs)
    # The search ends at 1 % of either end, where errors are flat.
    assert found <= best * 1.01


@given(VALUES, BITS)
def test_the_error_is_never_larger_than_that_of_the_extremes(x: Tensor, bits: int) -> None:
    bins, qmax = bins_of(x), 2**bits - 1
    low, high = mse_range(bins, 0, qmax)
    assert low <= 0.0 <= high
    assert low >= min(float(x.min()), 0.0) and high <= max(float(x.max()), 0.0)
    least = squared_error(bins, low, high, 0, qmax)
    assert 0.0 <= least <= squared_error(bins, float(x.min()), float(x.max()), 0, qmax)


def test_positive_values_get_a_grid_that_begins_at_zero() -> None:
    low, high = mse_range(bins_of(SAMPLES["relu"]), 0, 15)
    assert low == 0.0 and 2.0 < high < 3.5  # clipped: the largest of 20,000 is 4


def torchao_histogram() -> Any:
    """torchao's observer for 256 integers."""
    logging.disable(logging.WARNING)
    try:
        from torchao.quantization.pt2e.observer import HistogramObserver
    finally:
        logging.disable(logging.NOTSET)
    return HistogramObserver(quant_min=0, quant_max=255)


@pytest.mark.parametrize("name", [*SAMPLES, "signs", "two"])
def test_the_l2_search_is_torchao_s_own(name: str) -> None:
    few = {"signs": SAMPLES["normal"].sign(), "two": torch.tensor([0.7, 0.8] * 100)}
    x = SAMPLES.get(name, few.get(name))
    assert x is not None
    observer = torchao_histogram()
    for batch in x.split(7000):
        observer(batch)
    wanted = observer._non_linear_param_search()
    assert l2_range(observer.histogram, observer.min_val, observer.max_val, 256) == wanted


@pytest.mark.parametrize("seed", range(6))
def test_the_l2_search_is_torchao_s_own_with_millions_of_values(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    observer = torchao_histogram()
    tails = torch.rand(2, generator=generator) * 4  # the left tail and the right one are of different weight
    place = torch.linspace(-1, 1, 2048)
    density = torch.exp(-(place.abs() ** 0.5) * torch.where(place < 0, 9 + tails[0], 9 + tails[1]))
    observer.histogram.copy_(torch.poisson(1e6 * density, generator=generator))
    observer.min_val.fill_(-1.0)
    observer.max_val.fill_(2.0)
    wanted = observer._non_linear_param_search()
    assert l2_range(observer.histogram, observer.min_val, observer.max_val, 256) == wanted
    assert wanted[0] > -1.0 or wanted[1] < 2.0


def test_the_l2_search_knows_how_many_integers_there_are() -> None:
    """torchao's searches for 256, and leaves nearly all of a 4-bit grid to the tails."""
    x = SAMPLES["normal"]
    low, high = x.min(), x.max()
    histogram = torch.histc(x, 2048, min=float(low), max=float(high))
    fine, coarse = (l2_range(histogram, low, high, levels) for levels in (256, 16))
    assert real_error(x, *map(float, coarse), 15) < 0.9 * real_error(x, *map(float, fine), 15)
