"""Distillation: a simulation also learns what a float teacher says of each sample, not only what the labels say.

    loss = (1 - weight) * task + weight * T**2 * KL(softmax(teacher / T) || softmax(student / T))

The divergence is summed over classes, which dimension 1 holds, and averaged over everything else; of several outputs
the mean counts. T**2 keeps the size of its gradient where T changes. Source: Hinton et al. 2015 (arXiv:1503.02531),
section 2.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from edgeqat.errors import InputError
from edgeqat.per_sample import describe
from edgeqat.signature import Batch, call
from edgeqat.train.checkpoint import weights_of

__all__ = ["Distillation", "check_distillable", "distillation_loss"]


@dataclass(frozen=True, eq=False)
class Distillation:
    """Training with a teacher.

    Attributes:
        teacher: Called with the same batch as the student, augmented alike, in eval mode and without gradients; it
            gives class scores of the student's shapes, in the student's structure. `fit` leaves it in eval mode.
        weight: The teacher's share of the loss, 0 to 1; the rest is the task's.
        temperature: T, above 0; scores are divided by it, so that a larger one shows more of the unlikely classes.
    """

    teacher: nn.Module
    weight: float = 0.5
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.weight <= 1.0:
            raise InputError(f"found the distillation weight {self.weight}, wanted 0 to 1")
        if not (math.isfinite(self.temperature) and self.temperature > 0.0):
            raise InputError(f"found the distillation temperature {self.temperature}, wanted a finite one above 0")

    def loss(self, task: Tensor, inputs: Batch, outputs: Any, targets: Any) -> Tensor:
        """The loss of a batch with the teacher's part, 0-d, from the task's.

        Raises:
            InputError: There are no class scores to compare, or the teacher's have other shapes.
        """
        with torch.no_grad():
            taught = call(self.teacher, inputs)
        student, teacher = check_distillable(outputs, targets), _scores(taught)
        shapes = [[tuple(t.shape) for t in scores] for scores in (student, teacher)]
        if shapes[0] != shapes[1]:
            raise InputError(
                f"the distillation teacher's class scores are {shapes[1]}, the student's {shapes[0]}; "
                "wanted the same shapes"
            )
        return (1.0 - self.weight) * task + self.weight * distillation_loss(student, teacher, self.temperature)

    def describe(self) -> str:
        """Its settings and the hash of the teacher's weights: what training must agree with to be gone on from."""
        weights = hashlib.sha256(safetensors.torch.save(weights_of(self.teacher))).hexdigest()
        return f"distillation(teacher={weights[:16]}, weight={self.weight!r}, temperature={self.temperature!r})"


def check_distillable(outputs: Any, targets: Any) -> list[Tensor]:
    """The class scores among a model's outputs: every float tensor [N, C, ...] with two classes or more.

    Raises:
        InputError: There are none; or targets are real numbers, so that dimension 1 holds no classes.
    """
    for target in pytree.tree_leaves(targets):
        if isinstance(target, Tensor) and target.is_floating_point():
            raise InputError(
                f"distillation compares class scores, and targets are {describe(target)}, which are no classes; "
                "leave it out, or compare with the teacher in a loss of your own"
            )
    found = _scores(outputs)
    if not found:
        raise InputError(
            "distillation compares class scores, and no output is a float tensor [N, C, ...] with two classes or more"
        )
    return found


def distillation_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], temperature: float) -> Tensor:
    """T**2 times the divergence of a student's class scores from a teacher's, 0-d, float32.

    Args:
        student: Float tensors [N, C, ...].
        teacher: As many, of the same shapes.
        temperature: T.
    """
    divergences = []
    for own, taught in zip(student, teacher, strict=True):
        expected = F.log_softmax(taught.float() / temperature, dim=1)
        found = F.log_softmax(own.float() / temperature, dim=1)
        divergences.append(F.kl_div(found, expected, reduction="none", log_target=True).sum(1).mean())
    return temperature**2 * torch.stack(divergences).mean()


def _scores(outputs: Any) -> list[Tensor]:
    leaves = pytree.tree_leaves(outputs)
    return [t for t in leaves if isinstance(t, Tensor) and t.is_floating_point() and t.dim() > 1 and t.shape[1] > 1]
