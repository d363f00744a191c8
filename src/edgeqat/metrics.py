"""Metrics per sample, and the intervals that say how far a few hundred test images can be trusted.

A metric gives one figure per sample, not one per data set: a drop between two models is then measured on
pairs, which is far sharper than comparing two proportions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from edgeqat.errors import DataError

__all__ = [
    "METRICS",
    "Estimate",
    "Metric",
    "agreement",
    "paired_difference",
    "proportion_interval",
    "same_prediction",
    "top1",
]

Z_95 = 1.959963984540054
"""The 97.5% quantile of the normal distribution: two-sided 95% intervals."""

NO_PREDICTION = -1
"""The class of a sample whose outputs hold NaN; no label equals it."""


@dataclass(frozen=True)
class Estimate:
    """A figure measured on `n` samples, and its 95% interval [low, high]."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Metric:
    """A metric by name; `per_sample` maps (outputs, targets) to one figure in 0..1 per sample, [N]."""

    name: str
    higher_is_better: bool
    per_sample: Callable[[Tensor, Tensor], Tensor]


def top1(outputs: Tensor, targets: Tensor) -> Tensor:
    """Whether each sample's largest output is at its target.

    Ties go to the lowest index, as on every runtime; a sample whose outputs hold NaN is wrong.

    Args:
        outputs: Logits or integers, [N, C].
        targets: Labels in 0..C-1, integer [N].

    Returns:
        bool [N].

    Raises:
        DataError: other shapes, targets that are no integers, or a target out of range.

    >>> top1(torch.tensor([[1.0, 3.0], [2.0, 2.0]]), torch.tensor([1, 1]))
    tensor([ True, False])
    """
    predicted = _predict("outputs", outputs)
    if targets.shape != predicted.shape or targets.is_floating_point() or targets.dtype == torch.bool:
        raise DataError(f"targets are {_describe(targets)}, wanted integers [{len(predicted)}], one per output")
    classes = outputs.shape[1]
    if len(targets) > 0 and not 0 <= int(targets.min()) <= int(targets.max()) < classes:
        raise DataError(
            f"targets are {int(targets.min())} to {int(targets.max())}, wanted 0 to {classes - 1} for these "
            f"outputs of {classes} classes; does the model's num_classes match the data?"
        )
    return predicted == targets


def agreement(outputs_a: Tensor, outputs_b: Tensor) -> float:
    """Share of samples for which both outputs, [N, C], have their largest entry at the same index.

    Raises:
        DataError: the shapes differ or are not [N, C], or there is no sample.
    """
    if outputs_a.shape != outputs_b.shape:
        raise DataError(f"outputs are {_describe(outputs_a)} and {_describe(outputs_b)}, wanted one shape")
    a, b = _predict("outputs", outputs_a), _predict("outputs", outputs_b)
    if len(a) == 0:
        raise DataError("outputs have no samples, wanted at least 1")
    return int(((a == b) & (a != NO_PREDICTION)).sum()) / len(a)


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


def same_prediction(outputs: Tensor, targets: Tensor) -> Tensor:
    """Whether each sample's largest output is where the largest of its target outputs is: bool [N].

    Args:
        outputs: [N, C].
        targets: Another model's outputs, [N, C].

    Raises:
        DataError: other shapes.
    """
    if outputs.shape != targets.shape:
        raise DataError(f"outputs are {_describe(outputs)} and {_describe(targets)}, wanted one shape")
    predicted = _predict("outputs", outputs)
    return (predicted == _predict("targets", targets)) & (predicted != NO_PREDICTION)


METRICS: Mapping[str, Metric] = MappingProxyType(
    {"top1": Metric("top1", True, top1), "agreement": Metric("agreement", True, same_prediction)}
)
"""What `task.metric` may name."""


def _predict(what: str, outputs: Tensor) -> Tensor:
    """Index of each row's largest entry, int64 [N]; torch.argmax documents that the first of equals wins."""
    if outputs.ndim != 2 or outputs.shape[1] == 0:
        raise DataError(f"{what} are {_describe(outputs)}, wanted [N, C]")
    return outputs.argmax(1).masked_fill_(outputs.isnan().any(1), NO_PREDICTION)


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
