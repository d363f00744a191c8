"""The arithmetic of AOTInductor packages ("aoti"): oneDNN's INT8 kernels, and loops that compute as simulation does.

Float32 throughout, every step rounded on its own; rne is round half to even; z, lo, hi are the output's zero point and
bounds; q(x) = rne(clamp(x / s, lo - z, hi - z)) + z is quantize, true division, and d(q) = (q - z) * s dequantize:

    conv, linear  rne((fp32(acc) * s_x * s_w + b) * (1 / s_y) + z), b = fp32(bias * (s_x * s_w)); clamped
    float linear  fp32(acc) * s_x * s_w + b
    add, mul      q(d(a) + d(b)), q(d(a) * d(b))
    matmul        as conv, without a bias
    concat        an input on another grid: q(d(x))
    pools         q(fp32(sum(x - z_x)) * (s_x / n)), the sum exact

A package is made of these formulas, so that they hold on every processor; those of conv and linear are what
oneDNN's kernels were found to compute.
"""

from __future__ import annotations

import torch
from torch import Tensor

from edgeqat import affine
from edgeqat.interpreter.arithmetic.base import channels, window_sums
from edgeqat.interpreter.sum_forms import SumForm
from edgeqat.op_attrs import Attrs, AveragePoolAttrs
from edgeqat.program import Grid

__all__ = ["Aoti"]


class Aoti:
    """See the head of this file."""

    name = "aoti"
    add_block = 1
    fuses_sums = False
    dequantize_block = 1

    def quantize(self, x: Tensor, grid: Grid) -> Tensor:
        return affine.quantize(x, *grid.filled(), grid.qmin, grid.qmax)

    def dequantize(self, q: Tensor, grid: Grid) -> Tensor:
        return affine.dequantize(q, *grid.filled())

    def split_bias(
        self, bias: Tensor, input_scale: Tensor, weight_scale: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        return None, affine.float_bias(bias, input_scale, weight_scale)

    def requantize(
        self, acc: Tensor, bias: Tensor | None, input_scale: Tensor, weight_scale: Tensor, grid: Grid, attrs: Attrs
    ) -> Tensor:
        scale, zero_point = grid.filled()
        real = self.float_linear(acc, bias, input_scale, weight_scale)
        return real.mul_(1 / scale).add_(zero_point).round_().clamp_(grid.qmin, grid.qmax)

    def float_linear(self, acc: Tensor, bias: Tensor | None, input_scale: Tensor, weight_scale: Tensor) -> Tensor:
        real = acc.to(torch.float32).mul_(input_scale).mul_(channels(weight_scale, acc))
        return real if bias is None else real.add_(channels(bias, acc))

    def add(self, a: Tensor, a_grid: Grid, b: Tensor, b_grid: Grid, grid: Grid, form: SumForm | None = None) -> Tensor:
        return self.quantize(self.dequantize(a, a_grid) + self.dequantize(b, b_grid), grid)

    def mul(self, a: Tensor, a_grid: Grid, b: Tensor, b_grid: Grid, grid: Grid) -> Tensor:
        return self.quantize(self.dequantize(a, a_grid) * self.dequantize(b, b_grid), grid)

    def change_grid(self, q: Tensor, q_grid: Grid, grid: Grid, dim: int) -> Tensor:
        return self.quantize(self.dequantize(q, q_grid), grid)

    def global_average_pool(self, q: Tensor, q_grid: Grid, grid: Grid) -> Tensor:
        scale, zero_point = q_grid.filled()
        total = (q - zero_point).double().sum(dim=(-2, -1), keepdim=True)
        return self.quantize(total.to(torch.float32) * (scale / (q.shape[-2] * q.shape[-1])), grid)

    def average_pool(self, q: Tensor, q_grid: Grid, grid: Grid, attrs: AveragePoolAttrs) -> Tensor:
        scale, zero_point = q_grid.filled()
        total, count = window_sums(q - zero_point, attrs)
        return self.quantize(total * (scale / count), grid)
