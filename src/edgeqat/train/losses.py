"""What training minimises: losses by name, and the check of one before anything is trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from edgeqat.callables import USER_ERRORS
from edgeqat.errors import DataError, InputError, ModelError
from edgeqat.per_sample import IGNORED, describe

__all__ = ["LOSSES", "Loss", "check_loss", "explained", "resolve_loss"]

Loss: TypeAlias = Callable[[Any, Any], Tensor]
"""Maps the model's own output structure and the targets to a 0-d tensor."""


def _cross_entropy(outputs: Any, targets: Any) -> Tensor:
    """Cross-entropy; where every pixel has a class, those of 255 do not count, as in mean_iou."""
    is_map = isinstance(outputs, Tensor) and outputs.dim() == 4
    if not is_map or not isinstance(targets, Tensor) or targets.is_floating_point():
        return F.cross_entropy(outputs, targets)
    if not bool((targets != IGNORED).any()):
        nothing: Tensor = outputs.sum() * 0.0  # the mean over no pixels would be NaN
        return nothing
    return F.cross_entropy(outputs, targets, ignore_index=IGNORED)


def _of_one_shape(function: Loss) -> Loss:
    """Refuses what PyTorch would broadcast: [N, 1] against [N] is the mean over N * N pairs, with only a warning."""

    def loss(outputs: Any, targets: Any) -> Tensor:
        if isinstance(outputs, Tensor) and isinstance(targets, Tensor) and outputs.shape != targets.shape:
            raise DataError(
                f"outputs are {describe(outputs)}, targets {describe(targets)}, wanted one shape; reshape either side"
            )
        return function(outputs, targets)

    return loss


LOSSES: Mapping[str, Loss] = MappingProxyType(
    {
        "cross_entropy": _cross_entropy,
        "mse": _of_one_shape(F.mse_loss),
        "l1": _of_one_shape(F.l1_loss),
        "binary_cross_entropy_with_logits": _of_one_shape(F.binary_cross_entropy_with_logits),
    }
)
"""The built-in losses, by the names that `task.loss` may have."""


def resolve_loss(loss: str | Loss) -> Loss:
    """A loss function by its built-in name, or the callable itself.

    Raises:
        InputError: The name is unknown.
    """
    if callable(loss):
        return loss
    if loss not in LOSSES:
        raise InputError(f"found the loss {loss!r}, wanted one of {', '.join(LOSSES)}")
    return LOSSES[loss]


def explained(loss: Loss, given: str | Loss) -> Loss:
    """`loss`, which was `given` to `fit`; what is wrong with one of its results is said in a line."""
    name = given if isinstance(given, str) else getattr(given, "__name__", type(given).__name__)

    def checked(outputs: Any, targets: Any) -> Tensor:
        return check_loss(loss, name, "train_batches", outputs, targets)

    return checked


def check_loss(loss: Loss, name: str, source: str, outputs: Any, targets: Any) -> Tensor:
    """The loss of one batch of `source`, whose outputs carry gradients.

    Raises:
        ModelError: It fails, or is not a 0-d tensor with a gradient.
    """
    try:
        found: Any = loss(outputs, targets)
    except torch.OutOfMemoryError:
        raise
    except USER_ERRORS as error:
        # The loss may be the user's code, which may raise anything.
        text = f"the loss {name} of one batch of {source} fails: {type(error).__name__}: {error}"
        raise ModelError(text + _of_what(outputs, targets)) from error
    if not isinstance(found, Tensor):
        raise ModelError(f"the loss {name} returns a {type(found).__name__}, wanted a 0-d tensor")
    if found.ndim != 0:
        raise ModelError(f"the loss {name} returns {describe(found)}, wanted a 0-d tensor; take its mean")
    if not found.requires_grad:
        raise ModelError(
            f"the loss {name} has no gradient: compute it from the outputs in torch, without detach, item or numpy"
        )
    return found


def _of_what(outputs: Any, targets: Any) -> str:
    """What a loss was computed of, and for classes which they may be."""
    if not isinstance(outputs, Tensor) or not isinstance(targets, Tensor):
        return ""
    text = f" (outputs {describe(outputs)}, targets {describe(targets)})"
    if outputs.ndim < 2 or targets.ndim != outputs.ndim - 1:
        return text
    if targets.is_floating_point():
        return f"{text}; of classes, pass targets.long()"
    counted = targets[targets != IGNORED] if outputs.ndim == 4 else targets
    if counted.numel() == 0 or counted.device.type != "cpu":  # after a failed assertion a GPU computes nothing more
        return text
    low, high = int(counted.min()), int(counted.max())
    if low < 0 or high >= outputs.shape[1]:
        return f"{text}; found classes {low} to {high}, wanted 0 to {outputs.shape[1] - 1}"
    return text
