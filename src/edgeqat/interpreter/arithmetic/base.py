"""The protocol of an arithmetic: how one runtime, on one kernel family, computes and rounds."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from edgeqat.program import Grid

__all__ = ["Arithmetic"]


class Arithmetic(Protocol):
    """Integers are held in float32 (accumulators beyond 2**24 in float64), exactly; rounding is the arithmetic's.

    Shapes: accumulators are [N, C, ...]; `weight_scale` is 0-d or [C].
    """

    name: str

    def quantize(self, x: Tensor, grid: Grid) -> Tensor:
        """Float to integers of `grid`."""
        ...

    def dequantize(self, q: Tensor, grid: Grid) -> Tensor:
        """Integers to float32."""
        ...

    def requantize(self, acc: Tensor, input_scale: Tensor, weight_scale: Tensor, grid: Grid) -> Tensor:
        """An accumulator of conv or linear, bias included, to integers of `grid`."""
        ...

    def float_linear(self, acc: Tensor, input_scale: Tensor, weight_scale: Tensor) -> Tensor:
        """An accumulator of a last linear layer to float32 logits."""
        ...

    def add(self, a: Tensor, a_grid: Grid, b: Tensor, b_grid: Grid, grid: Grid) -> Tensor:
        """The sum of two values, in integers of `grid`."""
        ...

    def global_average_pool(self, q: Tensor, q_grid: Grid, grid: Grid) -> Tensor:
        """[N, C, H, W] to [N, C, 1, 1], in integers of `grid`."""
        ...

    def average_pool(self, x: Tensor, grid: Grid) -> Tensor:
        """A dequantized and averaged float32 value to integers of `grid`."""
        ...
