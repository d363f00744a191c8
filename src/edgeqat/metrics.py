"""Metrics: what is told of each sample, and how the figure of a data set follows from it.

A metric gives statistics per sample, not one figure per data set: a drop between two models is then measured on
pairs, and every metric, a mean or not, has intervals and a list of the samples that changed.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from edgeqat.arguments import pair_of
from edgeqat.callables import USER_ERRORS, resolve_callable
from edgeqat.errors import DataError, InputError
from edgeqat.intervals import (
    Estimate,
    bootstrap_difference,
    bootstrap_interval,
    mean_interval,
    paired_difference,
    proportion_interval,
)
from edgeqat.per_sample import (
    describe,
    iou_per_class,
    mae,
    mean_iou,
    mean_iou_value,
    predicted_class,
    same_prediction,
    top1,
    top5,
)
from edgeqat.signature import Batch

__all__ = ["METRICS", "Metric", "MetricLike", "Scores", "checked_statistics", "evaluate", "resolve_metric"]


def _mean(statistics: Tensor) -> float:
    return float(statistics)


@dataclass(frozen=True)
class Metric:
    """A metric by name.

    Attributes:
        name: As reported.
        higher_is_better: Which way is better.
        is_share: Whether its figures are in 0..1; they are then shown in percent.
        statistics: Maps (outputs, targets) of a batch to what is kept of each sample, [N, ...]. bool [N] is right or
            wrong, another [N] a figure per sample; either way the metric is its mean.
        value: Maps the mean of the statistics over samples, [...], to the metric; NaN where nothing counts.
        classes: Whether outputs are scores of classes along dimension 1.
        per_class: Maps statistics [..., C, k] to the metric of each class, [..., C], NaN where a class does not occur;
            None: a sample's class is the one in its targets.
    """

    name: str
    higher_is_better: bool
    is_share: bool
    statistics: Callable[[Any, Any], Tensor]
    value: Callable[[Tensor], float] = _mean
    classes: bool = False
    per_class: Callable[[Tensor], Tensor] | None = None

    def identity(self) -> dict[str, str]:
        """What tells it apart: its name; for one of the user's own, which may be rewritten, its source too."""
        return {"name": self.name} if METRICS.get(self.name) is self else {"name": self.name, "source": self._source()}

    def _source(self) -> str:
        """sha256; "" where there is no source to be had, as of a compiled function."""
        own = inspect.unwrap(self.statistics)
        try:
            text = inspect.getsource(own if inspect.isroutine(own) else type(own))
        except (OSError, TypeError):
            return ""
        return hashlib.sha256(text.encode()).hexdigest()

    def estimate(self, statistics: Tensor) -> Estimate:
        """The metric with its 95% interval; see `edgeqat.intervals` for the methods.

        Args:
            statistics: Of all samples, [N, ...].

        Raises:
            DataError: Too few samples for an interval, or nothing that counts.
        """
        if statistics.ndim > 1:
            return bootstrap_interval(statistics, self.value)
        if statistics.dtype == torch.bool:
            return proportion_interval(int(statistics.sum()), len(statistics))
        found = mean_interval(statistics)
        if not self.is_share:
            return found
        return Estimate(found.value, max(0.0, found.low), min(1.0, found.high), found.n)

    def drop(self, twin: Tensor, own: Tensor) -> Estimate:
        """By how much `own` is worse than `twin`, in the metric's unit, whichever way is better.

        Args:
            twin: Statistics of the model compared with, [N, ...].
            own: Statistics of the same samples in the same order.

        Raises:
            DataError: As `estimate`.
        """
        larger, smaller = (twin, own) if self.higher_is_better else (own, twin)
        if own.ndim > 1:
            return bootstrap_difference(larger, smaller, self.value)
        if self.is_share or own.dtype == torch.bool:
            return paired_difference(larger, smaller)
        return mean_interval(larger.double() - smaller.double())

    def figures(self, statistics: Tensor) -> Tensor:
        """The metric of each sample alone, float64 [N]; NaN where nothing in a sample counts."""
        if statistics.ndim == 1:
            return statistics.double()
        return torch.tensor([self.value(sample) for sample in statistics.double()], dtype=torch.float64)


MetricLike: TypeAlias = "str | Metric | Callable[[Any, Any], Tensor]"
"""A metric, its name, or a callable as `resolve_metric` takes it."""


@dataclass(frozen=True, eq=False)
class Scores:
    """What a metric tells of every sample of a data set.

    Attributes:
        statistics: [N, ...].
        predicted: The class with the largest score, int64 [N]; None where outputs are not scores [N, C].
        labelled: The class in the targets, int64 [N]; None where targets are something else.
    """

    statistics: Tensor
    predicted: Tensor | None
    labelled: Tensor | None


def evaluate(run: Callable[[Batch], Any], batches: Iterable[tuple[Batch, Any]], metric: Metric) -> Scores:
    """The statistics of all samples, without gradients.

    Args:
        run: Maps a batch of inputs to the model's own output structure.
        batches: (inputs, targets).
        metric: Gets outputs and targets batch by batch; outputs are not kept.

    Raises:
        InputError: A batch is no pair.
        DataError: No batches, outputs or targets that the metric does not take, or figures that are not finite.
    """
    statistics: list[Tensor] = []
    predicted: list[Tensor] = []
    labelled: list[Tensor] = []
    with torch.no_grad():
        for inputs, targets in map(pair_of, batches):
            outputs = run(inputs)
            statistics.append(checked_statistics(metric, outputs, targets))
            if metric.classes and isinstance(outputs, Tensor) and outputs.ndim == 2:
                predicted.append(predicted_class(outputs))
            if isinstance(targets, Tensor) and targets.ndim == 1 and targets.dtype == torch.int64:
                labelled.append(targets)
    if not statistics:
        raise DataError("found no batches to evaluate on, wanted at least one")
    return Scores(
        torch.cat(statistics),
        torch.cat(predicted) if predicted else None,
        torch.cat(labelled) if labelled else None,
    )


def resolve_metric(metric: MetricLike) -> Metric:
    """A metric by its built-in name, or of a callable (outputs, targets) -> one figure per sample, [N].

    The callable is given itself, or named as `module:callable` or `file.py:callable`. It gets the model's own output
    structure and the targets of a batch. It must have the attribute `higher_is_better` (bool), and may have
    `is_share` (bool, default False): its figures are in 0..1. Right or wrong is best given as bool.

    Raises:
        InputError: The name is unknown, or an attribute is missing or no bool.
        ModelError: The callable cannot be imported.

    >>> resolve_metric("mae").higher_is_better
    False
    """
    if isinstance(metric, Metric):
        return metric
    if isinstance(metric, str):
        if metric in METRICS:
            return METRICS[metric]
        if ":" not in metric:
            known = ", ".join(METRICS)
            raise InputError(f"found the metric {metric!r}, wanted one of {known}, or file.py:callable")
        name, function = metric.rpartition(":")[2], resolve_callable(metric, "task.metric")
    else:
        name, function = getattr(metric, "__name__", type(metric).__name__), metric
    better, is_share = getattr(function, "higher_is_better", None), getattr(function, "is_share", False)
    if not isinstance(better, bool):
        raise InputError(
            f"the metric {name} does not say which way is better; "
            f"write {name}.higher_is_better = True, or False, below its definition"
        )
    if not isinstance(is_share, bool):
        raise InputError(f"the metric {name} has is_share = {is_share!r}, wanted True (figures in 0..1) or False")
    return Metric(name, better, is_share, _guarded(function, name))


METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        "top1": Metric("top1", True, True, top1, classes=True),
        "top5": Metric("top5", True, True, top5, classes=True),
        "mean_iou": Metric("mean_iou", True, True, mean_iou, mean_iou_value, classes=True, per_class=iou_per_class),
        "mae": Metric("mae", False, False, mae),
        "agreement": Metric("agreement", True, True, same_prediction, classes=True),
    }
)
"""The built-in metrics, by the names that `task.metric` may have."""


def checked_statistics(metric: Metric, outputs: Any, targets: Any) -> Tensor:
    """What a metric tells of each sample of a batch, [N, ...].

    Raises:
        DataError: Outputs or targets that the metric does not take, or figures that are not finite.
    """
    found = metric.statistics(outputs, targets)
    bad = ~found.isfinite().flatten(1).all(1) if found.ndim > 1 else ~found.isfinite()
    if bool(bad.any()):
        raise DataError(
            f"the metric {metric.name} is NaN or infinite for {int(bad.sum())} of {len(bad)} samples of a batch, "
            "wanted finite figures; does the model return NaN?"
        )
    if metric.is_share and found.ndim == 1 and not bool(((found >= 0) & (found <= 1)).all()):
        low, high = float(found.min()), float(found.max())
        raise DataError(
            f"the metric {metric.name} gives figures of {low:.4g} to {high:.4g}, but its is_share = True means 0..1; "
            "leave is_share out"
        )
    return found


def _guarded(function: Callable[[Any, Any], Tensor], name: str) -> Callable[[Any, Any], Tensor]:
    """The user's own metric, with one clear line for whatever it does wrong."""

    @functools.wraps(function)
    def statistics(outputs: Any, targets: Any) -> Tensor:
        n = len(next(leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)))
        try:
            found: Any = function(outputs, targets)
        except USER_ERRORS as error:
            # It is the user's code, which may raise anything.
            raise DataError(f"the metric {name} fails on a batch: {type(error).__name__}: {error}") from error
        if not isinstance(found, Tensor) or found.shape != (n,) or found.is_complex():
            what = describe(found) if isinstance(found, Tensor) else f"a {type(found).__name__}"
            raise DataError(f"the metric {name} returns {what}, wanted a tensor [{n}], one figure per sample")
        return found.detach()

    return statistics
