"""Where quantization hurts: the samples and the classes that a quantized model changed against its float twin."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from edgeqat.metrics import Metric, Scores
from edgeqat.reporting.schema import ChangedSample, Changes, ClassRow, FlippedSample, Flips

__all__ = ["find_changes"]

LISTED = 50
"""How many samples are listed; all are counted."""


def find_changes(metric: Metric, twin: Scores, own: Scores, labels: Sequence[str] | None) -> Changes:
    """Compares a quantized model with its float twin, sample by sample and class by class.

    Args:
        metric: What both were scored with.
        twin: Of the float model.
        own: Of the quantized model, on the same samples in the same order.
        labels: The class names, None where there are no classes.
    """
    right_or_wrong = metric.classes and twin.statistics.dtype == torch.bool and own.statistics.dtype == torch.bool
    flips = right_or_wrong and twin.predicted is not None and own.predicted is not None
    return Changes(
        flips=_flips(twin, own, labels) if flips else None,
        largest=None if flips else _largest(metric, twin, own),
        per_class=_per_class(metric, twin, own, labels),
    )


def _flips(twin: Scores, own: Scores, labels: Sequence[str] | None) -> Flips:
    before, after = twin.predicted, own.predicted
    assert before is not None and after is not None
    right, still = twin.statistics, own.statistics
    lost, gained, moved = right & ~still, ~right & still, ~right & ~still & (before != after)
    chosen = (lost | gained | moved).nonzero().flatten().tolist()[:LISTED]
    targets = own.labelled
    return Flips(
        right_to_wrong=int(lost.sum()),
        wrong_to_right=int(gained.sum()),
        wrong_to_wrong=int(moved.sum()),
        samples=[
            FlippedSample(
                index=i,
                target=None if targets is None else _name(int(targets[i]), labels),
                float_class=_name(int(before[i]), labels),
                quantized_class=_name(int(after[i]), labels),
            )
            for i in chosen
        ],
    )


def _largest(metric: Metric, twin: Scores, own: Scores) -> list[ChangedSample]:
    before, after = metric.figures(twin.statistics), metric.figures(own.statistics)
    # Nothing counts in a sample whose figure is NaN: nothing changed in it either.
    drops = _worse_by(metric, before, after).nan_to_num(0.0)
    order = drops.abs().argsort(descending=True, stable=True)[:LISTED].tolist()
    return [
        ChangedSample(index=i, float_value=float(before[i]), quantized_value=float(after[i]), drop=float(drops[i]))
        for i in order
        if drops[i] != 0
    ]


def _per_class(metric: Metric, twin: Scores, own: Scores, labels: Sequence[str] | None) -> list[ClassRow] | None:
    if metric.per_class is not None:
        before, after = (metric.per_class(scores.statistics.double().mean(0)) for scores in (twin, own))
        occurs = [~metric.per_class(scores.statistics.double()).isnan() for scores in (twin, own)]
        n = (occurs[0] | occurs[1]).sum(0)
    elif own.labelled is not None and own.statistics.ndim == 1 and (metric.classes or labels is not None):
        classes = max(int(own.labelled.max()) + 1, 0 if labels is None else len(labels))
        n = torch.bincount(own.labelled, minlength=classes)
        before, after = (
            torch.bincount(own.labelled, scores.statistics.double(), minlength=classes) / n for scores in (twin, own)
        )
    else:
        return None
    drops = _worse_by(metric, before, after)
    return [
        ClassRow(
            name=_name(i, labels),
            n=int(n[i]),
            float_value=_known(before[i]),
            quantized_value=_known(after[i]),
            drop=_known(drops[i]),
        )
        for i in range(len(n))
        if n[i] > 0
    ]


def _worse_by(metric: Metric, before: Tensor, after: Tensor) -> Tensor:
    return before - after if metric.higher_is_better else after - before


def _known(figure: Tensor) -> float | None:
    value = float(figure)
    return None if math.isnan(value) else value


def _name(index: int, labels: Sequence[str] | None) -> str:
    """A class by its name; outputs that hold NaN predict class -1, which has none."""
    if index < 0:
        return "NaN"
    return str(index) if labels is None or index >= len(labels) else labels[index]
