"""Scales of weights."""

from __future__ import annotations

from torch import Tensor

from edgeqat import affine

__all__ = ["weight_scale"]


def weight_scale(weight: Tensor, observer: str, qmax: int, axis: int | None) -> Tensor:
    """The scale."""
    assert observer == "minmax"
    return affine.symmetric_scale(weight, qmax, axis)
