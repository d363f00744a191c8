"""Pure searches for the range of an activation: what to clip, so that what is left is represented more finely."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from edgeqat import affine
from edgeqat.simulate.float_histogram import Bins

__all__ = ["l2_range", "mse_range", "percentile_range", "squared_error"]

Range = tuple[float, float]


def percentile_range(bins: Bins, percentile: float) -> Range:
    """The range that leaves out at most 100 - percentile per cent of the values at either end.

    Inside the bin in which it falls a quantile is interpolated. Where that leaves nothing but zero, because
    (nearly) all values are zero, the range is that of the extremes.
    """
    low, high = float(bins.low[0]), float(bins.high[-1])
    up_to = bins.count.cumsum(0)
    total = float(up_to[-1])
    clipped = math.floor(total * (100.0 - percentile) / 100.0)

    def quantile(i: int, rank: float) -> float:
        share = (rank - float(up_to[i] - bins.count[i])) / float(bins.count[i])
        return float(bins.low[i] + share * (bins.high[i] - bins.low[i]))

    left = quantile(int(torch.searchsorted(up_to, clipped, right=True)), clipped)
    right = quantile(int(torch.searchsorted(up_to, total - clipped)), total - clipped)
    return (left, right) if left < 0.0 or right > 0.0 else (low, high)


def squared_error(bins: Bins, low: float, high: float, qmin: int, qmax: int, *, symmetric: bool = False) -> float:
    """The sum of squared errors of fake quantization on the grid of [low, high], clipped values included.

    Values are taken as spread evenly over their bin, and the error is integrated, not sampled: a bin may be wider
    than a quantization step.
    """
    scale, zero_point = affine.activation_qparams(low, high, qmin, qmax, symmetric=symmetric)
    step, first, last = float(scale), qmin - int(zero_point), qmax - int(zero_point)
    left, right = bins.low / step, bins.high / step
    width = right - left
    mean = (_error_up_to(right, first, last) - _error_up_to(left, first, last)) / width
    point = (left - left.round().clamp(first, last)) ** 2  # a bin without width holds one value
    return float((torch.where(width > 0.0, mean, point) * bins.count).sum()) * step**2


def _error_up_to(u: Tensor, first: int, last: int) -> Tensor:
    """The integral from 0 to u of the squared distance to the nearest integer of first .. last."""
    inside = u.clamp(first, last)
    nearest = inside.round()
    return nearest / 12.0 + (inside - nearest) ** 3 / 3.0 + (u - inside) ** 3 / 3.0


def mse_range(bins: Bins, qmin: int, qmax: int, *, symmetric: bool = False) -> Range:
    """The range whose grid has the smallest mean squared error; zero lies in it.

    Both ends are searched together: first over all pairs of a coarse grid of powers of two below the extremes,
    then around the best pair in steps that are halved down to 1 %. The extremes themselves are among the
    candidates, so that the error is never larger than theirs. On a `symmetric` grid the upper end alone is searched,
    for the lower one is its negative.
    """
    lowest, highest = min(float(bins.low[0]), 0.0), max(float(bins.high[-1]), 0.0)
    if lowest == highest:
        return lowest, highest
    if symmetric:
        lowest, highest = 0.0, max(-lowest, highest)

    def best_of(candidates: Iterable[Range]) -> tuple[float, Range]:
        """Candidates are pairs of octaves by which the ends are drawn in."""
        return min((error(*c), c) for c in candidates)

    def ends(a: float, b: float) -> Range:
        return lowest * 2.0**-a, highest * 2.0**-b

    def error(a: float, b: float) -> float:
        return squared_error(bins, *ends(a, b), qmin, qmax, symmetric=symmetric)

    coarse = [float(i) for i in range(9)]
    found = best_of(itertools.product(coarse if lowest < 0.0 else [0.0], coarse if highest > 0.0 else [0.0]))
    step = 0.5
    while step > 1 / 128:
        a, b = found[1]
        around_a = {max(a + d, 0.0) for d in (-step, 0.0, step)} if lowest < 0.0 else {0.0}
        around_b = {max(b + d, 0.0) for d in (-step, 0.0, step)} if highest > 0.0 else {0.0}
        nearby = best_of(itertools.product(around_a, around_b))
        if nearby[0] < found[0]:
            found = nearby
        else:
            step /= 2
    return ends(*found[1])


def l2_range(histogram: Tensor, low: Tensor, high: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """The search of torchao's HistogramObserver (caffe2's norm minimization), with its arithmetic, but quickly.

    From both ends it clips 0.001 % of the values at a time, as long as the error falls. torchao compares tensors
    element by element, which takes seconds where values lie in a few bins; and it always searches for 256 levels.

    Args:
        histogram: Counts over equal bins of [low, high], float32 [bins].
        low: float32, 0-d.
        high: float32, 0-d.
        levels: Number of integers of the grid.

    Returns:
        The range found, both float32, 0-d.
    """
    bins = histogram.numel()
    up_to, total = histogram.cumsum(0).tolist(), float(histogram.sum())
    alpha, beta, start, end = 0.0, 1.0, 0, bins - 1
    smallest = math.inf
    while alpha < beta:
        next_alpha, next_beta = alpha + 1e-5, beta - 1e-5
        left, right = start, end
        below, above = float(np.float32(next_alpha * total)), float(np.float32(next_beta * total))
        while left < end and up_to[left] < below:
            left += 1
        while right > start and up_to[right] > above:
            right -= 1
        next_start, next_end = start, end
        if left - start > end - right:
            next_start, alpha = left, next_alpha
        else:
            next_end, beta = right, next_beta
        if (next_start, next_end) == (start, end):
            continue
        norm = _l2_norm(histogram, float(low), float(high), next_start, next_end, levels)
        if norm > smallest:
            break
        smallest, start, end = norm, next_start, next_end
    width = (high - low) / bins
    return low + width * start, low + width * (end + 1)


def _l2_norm(histogram: Tensor, low: float, high: float, start: int, end: int, levels: int) -> float:
    """The squared error of `levels` equal steps over the bins start .. end, values spread evenly over their bin."""
    bins = histogram.numel()
    width = (high - low) / bins
    step = width * (end - start + 1) / levels
    if step == 0.0:
        return 0.0
    left = (torch.arange(bins) - start) * width
    right = left + width
    first = torch.div(left, step, rounding_mode="floor").clamp(0, levels - 1)
    last = torch.div(right, step, rounding_mode="floor").clamp(0, levels - 1)
    density = histogram / width
    half = torch.tensor(step / 2)

    def integral(begin: Tensor, until: Tensor) -> Tensor:
        return density * ((until * until * until - begin * begin * begin) / 3)

    norm = integral(left - (first + 0.5) * step, half)
    norm = norm + (last - first - 1) * integral(-half, half)
    norm = norm + integral(-half, right - (last * step + step / 2))
    return float(norm.sum())
