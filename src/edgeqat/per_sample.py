"""What the built-in metrics tell of each sample of a batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from edgeqat.errors import DataError

__all__ = [
    "IGNORED",
    "describe",
    "iou_per_class",
    "mae",
    "mean_iou",
    "mean_iou_value",
    "predicted_class",
    "same_prediction",
    "top1",
    "top5",
]

NO_PREDICTION = -1
"""The class of a sample whose outputs hold NaN; no label equals it."""

IGNORED = 255
"""The class of pixels that do not count, in segmentation targets."""


def top1(outputs: Any, targets: Any) -> Tensor:
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
    scores, labels = _classified(outputs, targets)
    return predicted_class(scores) == labels


def top5(outputs: Any, targets: Any) -> Tensor:
    """Whether each sample's target is among its five largest outputs; arguments, ties and errors as of `top1`.

    Raises:
        DataError: as `top1`, or there are fewer than 5 classes.
    """
    scores, labels = _classified(outputs, targets)
    classes = scores.shape[1]
    if classes < 5:
        raise DataError(f"outputs are of {classes} classes, wanted at least 5 for top5; use top1")
    own = scores.gather(1, labels.long()[:, None])
    earlier = torch.arange(classes) < labels[:, None]
    ahead = ((scores > own) | ((scores == own) & earlier)).sum(1)
    return (ahead < 5) & ~scores.isnan().any(1)


def mean_iou(outputs: Any, targets: Any) -> Tensor:
    """Pixels of each class that are right, and pixels that either side gives to it: intersection and union.

    A pixel whose scores hold NaN is predicted as no class. The metric is the mean, over the classes that occur, of
    the intersection over all samples by the union over all samples.

    Args:
        outputs: Scores, [N, C, H, W].
        targets: Classes in 0..C-1, or 255 where a pixel does not count, integer [N, H, W].

    Returns:
        float64 [N, C, 2].

    Raises:
        DataError: other shapes, targets that are no integers, or a target out of range.
    """
    outputs, targets = _tensors("mean_iou", outputs, targets)
    if outputs.ndim != 4 or outputs.shape[1] == 0:
        raise DataError(f"outputs are {describe(outputs)}, wanted scores [N, C, H, W] for mean_iou")
    n, classes = outputs.shape[:2]
    wanted = [n, *outputs.shape[2:]]
    if list(targets.shape) != wanted or not _integer(targets):
        raise DataError(f"targets are {describe(targets)}, wanted classes of pixels, integers {wanted}")
    counted = targets != IGNORED
    _check_range(targets[counted], classes)
    predicted = predicted_class(outputs)
    sample = torch.arange(n)[:, None, None].expand_as(predicted)

    def count(chosen: Tensor, of: Tensor) -> Tensor:
        index = sample[chosen] * classes + of[chosen]
        return torch.bincount(index, minlength=n * classes).reshape(n, classes).double()

    intersection = count(counted & (predicted == targets), predicted)
    either = count(counted, targets.long()) + count(counted & (predicted != NO_PREDICTION), predicted)
    return torch.stack([intersection, either - intersection], 2)


def mae(outputs: Any, targets: Any) -> Tensor:
    """Mean absolute error of each sample, over all its elements.

    Args:
        outputs: [N, ...].
        targets: Of the same shape.

    Returns:
        float64 [N].

    Raises:
        DataError: the shapes differ.
    """
    found, wanted = _tensors("mae", outputs, targets)
    if found.shape != wanted.shape or found.ndim == 0:
        raise DataError(
            f"outputs are {describe(found)}, targets {describe(wanted)}, wanted one shape for mae; reshape either side"
        )
    return (found.double() - wanted.double()).abs().reshape(len(found), -1).mean(1)


def same_prediction(outputs: Any, targets: Any) -> Tensor:
    """Whether, or for which share of its pixels, a sample's largest output is where that of its target outputs is.

    Ties go to the lowest index; NaN agrees with nothing.

    Args:
        outputs: [N, C], or [N, C, ...] for scores of every pixel.
        targets: Another model's outputs, of the same shape.

    Returns:
        bool [N], or for every pixel's scores float64 [N].

    Raises:
        DataError: other shapes, or a single class, on which any two models agree.
    """
    found, others = _tensors("agreement", outputs, targets)
    if found.shape != others.shape:
        raise DataError(
            f"outputs are {describe(found)}, targets {describe(others)}, wanted another model's outputs, of one shape"
        )
    if found.ndim < 2 or found.shape[1] < 2:
        raise DataError(f"outputs are {describe(found)}, wanted scores [N, C] of at least 2 classes for agreement")
    predicted = predicted_class(found)
    same = (predicted == predicted_class(others)) & (predicted != NO_PREDICTION)
    return same if same.ndim == 1 else same.flatten(1).double().mean(1)


def iou_per_class(statistics: Tensor) -> Tensor:
    """Intersection over union of each class, [..., C], NaN for one that does not occur; of statistics [..., C, 2]."""
    # 0 / 0 is NaN: the class is neither predicted nor there.
    return statistics[..., 0] / statistics[..., 1]


def mean_iou_value(mean_C2: Tensor) -> float:
    """The mean over the classes that occur; NaN where none does. Takes statistics [C, 2]."""
    return float(iou_per_class(mean_C2).nanmean())


def _tensors(name: str, outputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
    """Both as tensors, which is what a built-in metric takes."""
    for what, found in (("the model returns", outputs), ("the targets are", targets)):
        if not isinstance(found, Tensor):
            raise DataError(
                f"{what} a {type(found).__name__}, and the metric {name} takes one tensor; "
                "name a callable (outputs, targets) of your own: task.metric: file.py:callable"
            )
    return outputs, targets


def _classified(outputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
    """Scores [N, C] and labels [N], checked."""
    outputs, targets = _tensors("top1 or top5", outputs, targets)
    if outputs.ndim != 2 or outputs.shape[1] == 0:
        raise DataError(f"outputs are {describe(outputs)}, wanted [N, C]")
    if targets.shape != outputs.shape[:1] or not _integer(targets):
        raise DataError(f"targets are {describe(targets)}, wanted integers [{len(outputs)}], one per output")
    _check_range(targets, outputs.shape[1])
    return outputs, targets


def _check_range(targets: Tensor, classes: int) -> None:
    if targets.numel() > 0 and not 0 <= int(targets.min()) <= int(targets.max()) < classes:
        raise DataError(
            f"targets are {int(targets.min())} to {int(targets.max())}, wanted 0 to {classes - 1} for these "
            f"outputs of {classes} classes; does the model's num_classes match the data?"
        )


def predicted_class(outputs: Tensor) -> Tensor:
    """Index of the largest entry along dimension 1, int64; torch.argmax documents that the first of equals wins."""
    return outputs.argmax(1).masked_fill_(outputs.isnan().any(1), NO_PREDICTION)


def _integer(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)


def describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
