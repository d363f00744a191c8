"""What only moves integers: they change place, not value, and keep their grid."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from edgeqat.errors import EdgeqatError
from edgeqat.op_attrs import (
    ClampAttrs,
    ExpandAttrs,
    MaxPoolAttrs,
    PadAttrs,
    PermuteAttrs,
    ResizeAttrs,
    SliceAttrs,
    ViewAttrs,
)
from edgeqat.program import Op

__all__ = ["move"]


def move(op: Op, x: Tensor, zero_point: int) -> Tensor:
    """The result of a passthrough op.

    Args:
        op: Its attributes say what moves where.
        x: Integers, as floats or in an integer type that the torch function behind the op takes.
        zero_point: What is padded with, and where a clamp is.

    Raises:
        EdgeqatError: The op computes something.
    """
    attrs = op.attrs
    if isinstance(attrs, MaxPoolAttrs):
        return F.max_pool2d(x, attrs.kernel, attrs.stride, attrs.padding, attrs.dilation, attrs.ceil_mode)
    if isinstance(attrs, ViewAttrs):
        return x.reshape(attrs.shape)
    if isinstance(attrs, PermuteAttrs):
        return x.permute(attrs.dims)
    if isinstance(attrs, ClampAttrs):
        return x.clamp_min(zero_point)
    if isinstance(attrs, ExpandAttrs):
        return x.expand(attrs.shape)
    if isinstance(attrs, ResizeAttrs):
        for dim, factor in enumerate(attrs.factors):
            x = x.repeat_interleave(factor, dim + 2)
        return x
    if isinstance(attrs, PadAttrs):
        if attrs.mode != "constant":
            return F.pad(x, [side for pair in reversed(attrs.padding[2:]) for side in pair], attrs.mode)
        return F.pad(x, [side for pair in reversed(attrs.padding) for side in pair], value=float(zero_point))
    if isinstance(attrs, SliceAttrs):
        index = [slice(None)] * x.dim()
        index[attrs.dim] = slice(attrs.start, attrs.stop, attrs.step)
        return x[tuple(index)]
    raise EdgeqatError(f"{op.name}: no rule to run kind {op.kind.value}")
