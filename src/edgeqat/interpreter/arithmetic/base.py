"""The protocol of an arithmetic: how one runtime, on one kernel family, computes and rounds.

And the few steps that several of them share.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from edgeqat import affine
from edgeqat.interpreter.sum_forms import SumForm
from edgeqat.op_attrs import Attrs, AveragePoolAttrs
from edgeqat.program import Grid

__all__ = ["Arithmetic", "Saturating", "channels", "fma", "round_outside", "window_sums"]


class Arithmetic(Protocol):
    """Integers are held in float32 (accumulators beyond 2**24 in float64), exactly; rounding is the arithmetic's.

    Shapes: accumulators are [N, C, ...]; `weight_scale` is 0-d or [C].

    Attributes:
        name: What it is called.
        add_block: Elements that an addition computes together; those left over at the end of the whole tensor may
            come out differently. 1 where every element is computed alike.
        fuses_sums: Whether an addition depends on what is before it, see `edgeqat.interpreter.sum_forms`.
        dequantize_block: The same of a dequantization.
    """

    name: str
    add_block: int
    fuses_sums: bool
    dequantize_block: int

    def quantize(self, x: Tensor, grid: Grid) -> Tensor:
        """Float to integers of `grid`."""
        ...

    def dequantize(self, q: Tensor, grid: Grid) -> Tensor:
        """Integers to float32."""
        ...

    def split_bias(
        self, bias: Tensor, input_scale: Tensor, weight_scale: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """The int32 [C] bias as this runtime adds it: (integers into the accumulator, float32 in `requantize`)."""
        ...

    def requantize(
        self, acc: Tensor, bias: Tensor | None, input_scale: Tensor, weight_scale: Tensor, grid: Grid, attrs: Attrs
    ) -> Tensor:
        """An accumulator of conv or linear (which `attrs` tells), and the float part of its bias, to integers.

        `acc` may be overwritten.
        """
        ...

    def float_linear(self, acc: Tensor, bias: Tensor | None, input_scale: Tensor, weight_scale: Tensor) -> Tensor:
        """An accumulator of a last linear layer, and the float part of its bias, to float32 logits."""
        ...

    def add(self, a: Tensor, a_grid: Grid, b: Tensor, b_grid: Grid, grid: Grid, form: SumForm | None = None) -> Tensor:
        """The sum of two values, in integers of `grid`; `form` is given where the arithmetic fuses sums."""
        ...

    def mul(self, a: Tensor, a_grid: Grid, b: Tensor, b_grid: Grid, grid: Grid) -> Tensor:
        """The product of two values, in integers of `grid`."""
        ...

    def change_grid(self, q: Tensor, q_grid: Grid, grid: Grid, dim: int) -> Tensor:
        """A value in integers of another grid, as a concatenation along `dim` needs it."""
        ...

    def global_average_pool(self, q: Tensor, q_grid: Grid, grid: Grid) -> Tensor:
        """[N, C, H, W] to [N, C, 1, 1], in integers of `grid`."""
        ...

    def average_pool(self, q: Tensor, q_grid: Grid, grid: Grid, attrs: AveragePoolAttrs) -> Tensor:
        """The means of windows of [N, C, H, W], in integers of `grid`; `attrs.kernel` is not None."""
        ...


@runtime_checkable
class Saturating(Protocol):
    """What an arithmetic has besides where its kernels lose a part of their sums; all others add exactly."""

    def saturation(self, q: Tensor, grid: Grid, weight: Tensor, attrs: Attrs) -> Tensor | None:
        """What to add to the exact accumulators of a conv, transposed conv or linear; None for nothing.

        Args:
            q: Integers of the input in float32, [N, C, ...] or [..., K], zero point included.
            grid: Theirs.
            weight: Integers in floats, in the parameter's shape.
            attrs: Of the op.
        """
        ...


def fma(a: Tensor, b: Tensor, addend: Tensor) -> Tensor:
    """a * b + addend, rounded to float32 once.

    float64 holds the product of two float32 exactly. Its sum is exact too where one factor has 8 bits; in `quantize`,
    where none has, it may be rounded at bit 53, which moves the second rounding only where the first lands on a tie
    of float32: odds of 2**-30 an element, and none of 2 million was seen.
    """
    # One pass: whether addcmul rounds the product is of no matter, for it is exact.
    return torch.addcmul(addend.double(), a.double(), b.double()).to(torch.float32)


def channels(parameter: Tensor, acc: Tensor) -> Tensor:
    """A 0-d or [C] parameter, so that it broadcasts along dimension 1 of `acc`."""
    return affine.broadcast(parameter, 1 if parameter.dim() else None, acc.dim())


def round_outside(x: Tensor, grid: Grid) -> Tensor:
    """round(clamp(x)) + zero_point, clamped to the grid: the zero point is added after rounding. Overwrites x."""
    _, zero_point = grid.filled()
    z = int(zero_point)
    # Fresh memory costs more than the arithmetic does.
    rounded = x.clamp_(grid.qmin - z, grid.qmax - z).round_()
    return rounded.add_(z) if z else rounded


def window_sums(shifted: Tensor, attrs: AveragePoolAttrs) -> tuple[Tensor, Tensor]:
    """Exact integer sums of the windows of an average pool, and how many elements each mean is over.

    Args:
        shifted: Integers with the zero point taken off, [N, C, H, W].
        attrs: Of the pool; `kernel` is not None.

    Returns:
        (sums, counts), float32, [N, C, H_out, W_out] and broadcastable to it.
    """
    kernel = attrs.kernel
    assert kernel is not None
    area = kernel[0] * kernel[1]

    def sums(x: Tensor) -> Tensor:
        return (F.avg_pool2d(x.double(), kernel, attrs.stride, attrs.padding) * area).round().float()

    total = sums(shifted)
    if attrs.count_include_pad:
        return total, torch.tensor(float(area))
    return total, sums(torch.ones_like(shifted[:1, :1]))
