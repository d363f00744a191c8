"""Weights put onto integers that were chosen for them, so that rounding to nearest gives these and the grid stays."""

from __future__ import annotations

import torch
from torch import Tensor

from edgeqat import affine

__all__ = ["Neighbours", "snap"]


class Neighbours:
    """The two integers next to each weight, and which of the weights may move between them.

    Args:
        weight: float32, any shape.
        scale: float32, [C] or 0-d: its grid's.
        qmax: The grid's largest integer; the smallest is -qmax.
        axis: Channel dimension of `scale`.
        follows: Whether the scale follows the largest weight of a channel, which must then stay where it is.

    Attributes:
        below: The lower integer, float32.
        fraction: How far the weight lies above it, 0..1; 0 where the weight lies on an integer or beyond the grid.
        movable: bool; False where the two are one, or the weight is one that the scale follows.
        nearest: What rounding to nearest gives, ties to even.
    """

    def __init__(self, weight: Tensor, scale: Tensor, qmax: int, axis: int | None, follows: bool) -> None:
        steps = (weight.detach().float() / affine.broadcast(scale, axis, weight.dim())).clamp(-qmax, qmax)
        self.below, self.nearest = steps.floor(), steps.round()
        self.fraction = steps - self.below
        self.movable = self.fraction > 0
        if follows:
            self.movable &= weight.detach().abs() < _largest(weight, axis)

    def rounded(self, up: Tensor) -> Tensor:
        """The integers, float32: the upper one where `up`, a bool tensor, is True; of a fixed weight the nearest."""
        return torch.where(self.movable, self.below + up, self.nearest)


def snap(weight: Tensor, integers: Tensor, scale: Tensor, qmax: int, axis: int | None, follows: bool) -> Tensor:
    """Weights of `scale`'s grid whose nearest integers are `integers`: scale * integers, but for some last bits.

    Where the scale follows the largest weight, fl(max |w| / qmax) must be the very scale it was: the largest weights
    stay, and no other may be so large that the quotient is rounded to more.

    Args:
        weight: As it was, float32.
        integers: float32 of its shape, from `Neighbours.rounded`.
        scale: The scale that the weight has, [C] or 0-d.
        qmax: Largest integer.
        axis: Channel dimension of `scale`.
        follows: Whether the scale follows the largest weight.

    >>> w = torch.tensor([0.7, 0.26])
    >>> snap(w, torch.tensor([7.0, 2.0]), torch.tensor(0.7) / 7, 7, None, True)
    tensor([0.7000, 0.2000])
    """
    step = affine.broadcast(scale, axis, weight.dim())
    values = integers * step
    if not follows:
        return values
    values = torch.where(weight.abs() == _largest(weight, axis), weight, values)
    while bool((over := values.abs() / qmax > step).any()):
        values = torch.where(over, torch.nextafter(values, torch.zeros_like(values)), values)
    return values


def _largest(weight: Tensor, axis: int | None) -> Tensor:
    """The largest |w| of each channel, or of all; it broadcasts against the weight."""
    magnitude = weight.detach().abs()
    if axis is None:
        return magnitude.amax()
    return magnitude.amax(dim=[d for d in range(weight.dim()) if d != axis], keepdim=True)
