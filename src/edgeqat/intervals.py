"""95% intervals: how far a few hundred test samples can be trusted.

What two models did on the same samples is compared in pairs, which is far sharper than comparing two figures.

    0/1 figures, their share        Wilson; of a difference Agresti and Min
    other figures, their mean       Student's t, of a difference on the differences
    anything else                   percentile bootstrap over samples, of a difference on the same resamples
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import stdtrit
from torch import Tensor

from edgeqat.errors import DataError

__all__ = [
    "BOOTSTRAP_N",
    "Z_95",
    "Estimate",
    "bootstrap_difference",
    "bootstrap_interval",
    "mean_interval",
    "paired_difference",
    "proportion_interval",
]

Z_95 = 1.959963984540054
"""The 97.5% quantile of the normal distribution: two-sided 95% intervals."""

BOOTSTRAP_N = 2000
"""Resamples: the ends then rest on 50 resamples each."""
BOOTSTRAP_SEED = 1979
BOOTSTRAP_CHUNK = 100
"""Resamples drawn at once: a chunk of counts is [100, N]."""


@dataclass(frozen=True)
class Estimate:
    """A figure measured on `n` samples, and its 95% interval [low, high]."""

    value: float
    low: float
    high: float
    n: int


def proportion_interval(successes: int, n: int) -> Estimate:
    """`successes / n` with its 95% interval after Wilson, honest at 0 and at n.

    E. B. Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22 (1927)
    209-212.

    Raises:
        DataError: n is below 1, or successes is not in 0..n.

    >>> interval = proportion_interval(10, 10)
    >>> interval.value, round(interval.low, 4), interval.high
    (1.0, 0.7225, 1.0)
    """
    if n < 1 or not 0 <= successes <= n:
        raise DataError(f"{successes} successes in {n} samples, wanted at least 1 sample and 0 to n successes")
    share = successes / n
    shrink = 1 + Z_95**2 / n
    centre = (share + Z_95**2 / (2 * n)) / shrink
    half = Z_95 / shrink * math.sqrt(share * (1 - share) / n + Z_95**2 / (4 * n**2))
    # At 0 and at n the bound equals the share exactly; rounding must not put it on the wrong side.
    return Estimate(share, max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half)), n)


def paired_difference(a: Tensor, b: Tensor) -> Estimate:
    """mean(a) - mean(b) over the same samples, with a 95% interval.

    The interval is the adjusted Wald one of A. Agresti and Y. Min, "Simple improved confidence intervals for
    comparing matched proportions", Statistics in Medicine 24 (2005) 729-740: half a sample is added to each
    of the four cells (both right, only a, only b, both wrong). With no discordant sample the plain Wald
    interval would have no width; this one tells 20 samples from 2000. Figures between 0 and 1 get the same
    two pseudo-samples.

    Args:
        a: One figure in 0..1 per sample, bool, integer or float [N].
        b: As `a`, for the same samples in the same order.

    Returns:
        `value` is the plain difference; the interval's centre is drawn towards 0.

    Raises:
        DataError: other shapes, no samples, or figures outside 0..1.
    """
    if a.ndim != 1 or a.shape != b.shape or len(a) == 0:
        raise DataError(f"paired figures are {_describe(a)} and {_describe(b)}, wanted [N] for the same samples")
    first, second = a.double(), b.double()
    both = torch.stack([first, second])
    # Written so that NaN, which compares false, is refused too.
    if not bool(((both >= 0) & (both <= 1)).all()):
        raise DataError("paired figures are not all in 0..1, wanted shares or correctness per sample")
    n = len(a)
    difference = first - second
    total = float(difference.sum())
    # Half a sample per cell: the discordant cells add 1/2 and -1/2, that is 0 in sum and 1 in sum of squares.
    adjusted_n = n + 2
    squares = float((difference**2).sum()) + 1
    centre = total / adjusted_n
    half = Z_95 * math.sqrt(squares - total**2 / adjusted_n) / adjusted_n
    return Estimate(total / n, max(-1.0, centre - half), min(1.0, centre + half), n)


def mean_interval(figures: Tensor) -> Estimate:
    """The mean of one figure per sample, [N], with its 95% interval after Student.

    "Student", "The probable error of a mean", Biometrika 6 (1908) 1-25: exact for normal figures, and good for
    means of many of any distribution. Of two models on the same samples, give the differences. Figures that are
    all equal give an interval without width.

    Raises:
        DataError: figures are not [N], there are fewer than 2, or one is NaN or infinite.

    >>> interval = mean_interval(torch.tensor([1.0, 2.0, 3.0]))
    >>> interval.value, round(interval.low, 4), round(interval.high, 4)
    (2.0, -0.4841, 4.4841)
    """
    if figures.ndim != 1 or len(figures) < 2:
        raise DataError(f"figures are {_describe(figures)}, wanted [N] of at least 2 samples for an interval")
    exact = figures.double()
    if not bool(exact.isfinite().all()):
        raise DataError("figures hold NaN or infinity, wanted finite ones")
    n, mean = len(figures), float(exact.mean())
    half = float(stdtrit(n - 1, 0.975)) * float(exact.std()) / math.sqrt(n)
    return Estimate(mean, mean - half, mean + half, n)


def bootstrap_interval(statistics: Tensor, value: Callable[[Tensor], float]) -> Estimate:
    """`value` of the mean statistics, with its 95% percentile bootstrap interval over samples.

    B. Efron and R. J. Tibshirani, "An Introduction to the Bootstrap" (1993), chapter 13. 2000 resamples, seeded:
    the same statistics give the same interval. It is widened to hold the value itself where it does not; resamples
    whose value is NaN (nothing in them counts) are left out.

    Args:
        statistics: [N, ...].
        value: Maps mean statistics [...] to the figure.

    Raises:
        DataError: There are fewer than 2 samples, or the value is NaN.
    """
    return _bootstrap(statistics, value)


def bootstrap_difference(a: Tensor, b: Tensor, value: Callable[[Tensor], float]) -> Estimate:
    """value(mean a) - value(mean b), statistics [N, ...] of the same samples; both are resampled alike.

    See `bootstrap_interval`.

    Raises:
        DataError: The shapes differ, there are fewer than 2 samples, or a value is NaN.
    """
    if a.shape != b.shape:
        raise DataError(f"paired statistics are {_describe(a)} and {_describe(b)}, wanted one shape")
    return _bootstrap(torch.stack([a, b], 1), lambda mean: value(mean[0]) - value(mean[1]))


def _bootstrap(statistics: Tensor, value: Callable[[Tensor], float]) -> Estimate:
    n = len(statistics)
    if n < 2:
        raise DataError(f"statistics are {_describe(statistics)}, wanted at least 2 samples for an interval")
    flat, shape = statistics.double().flatten(1), statistics.shape[1:]
    figure = value(flat.mean(0).reshape(shape))
    if math.isnan(figure):
        raise DataError(f"nothing in the {n} samples counts, wanted at least one target that is not ignored")
    generator = np.random.default_rng(BOOTSTRAP_SEED)
    found: list[float] = []
    for _ in range(BOOTSTRAP_N // BOOTSTRAP_CHUNK):
        # How often each sample is drawn; a resample's mean is then one product.
        drawn = generator.integers(n, size=(BOOTSTRAP_CHUNK, n)) + n * np.arange(BOOTSTRAP_CHUNK)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=n * BOOTSTRAP_CHUNK).reshape(BOOTSTRAP_CHUNK, n)
        means = torch.from_numpy(counts).double() @ flat / n
        found += [value(mean.reshape(shape)) for mean in means]
    low, high = np.nanquantile(found, [0.025, 0.975])
    return Estimate(figure, min(figure, float(low)), max(figure, float(high)), n)


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
