"""XNNPACK's arithmetic, as ExecuTorch's delegate uses it ("xnnpack").

Float32 unless said; rne is round half to even; z is the output's zero point; everything is clamped to the grid:

    quantize      rne(x * (1 / s)) + z
    dequantize    (q - z) * s
    conv, linear  rne(fp32(acc + bias) * ((s_x * s_w) / s_y)) + z
    add           fixed point: with r = s / s_y, shift = 20 - floor(log2(max(r_a, r_b))), m = rne(r * 2**shift),
                  floor(((a - z_a) * m_a + (b - z_b) * m_b) / 2**shift + 1/2) + z
    mul           rne(fp32((a - z_a) * (b - z_b)) * ((s_a * s_b) / s_y)) + z
    concat        an input on another grid is multiplied by one, which is 1 on a grid of scale 1
    global pool   rne(fp32(sum c) * (1 / n) + (c_z - fp32(c_z * n) * (1 / n))), c = q - 128 and c_z = z - 128 as stored
    average pool  as conv, with weights of 1 at the scale 1 / n

LiteRT's delegate computes the same on 64-bit ARM, where it ran under emulation; ExecuTorch was not run there.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from edgeqat import affine
from edgeqat.errors import EdgeqatError
from edgeqat.interpreter.arithmetic.base import channels, round_outside, window_sums
from edgeqat.interpreter.sum_forms import SumForm
from edgeqat.op_attrs import Attrs, AveragePoolAttrs
from edgeqat.program import Grid

__all__ = ["INT8_SHIFT", "ONE", "Xnnpack"]

ADD_BITS = 20
"""Bits of the larger multiplier of an addition."""


INT8_SHIFT = 128

ONE = Grid(0, 255, None, torch.tensor(1.0), torch.tensor(0, dtype=torch.int32))
"""The grid of the number that brings a value onto another grid: its integer 1 is 1."""


class Xnnpack:
    """See the head of this file."""

    name = "xnnpack"
    add_block = 1
    fuses_sums = False
    dequantize_block = 1

    def quantize(self, x: Tensor, grid: Grid) -> Tensor:
        return round_outside(x * (1 / grid.filled()[0]), grid)

    def dequantize(self, q: Tensor, grid: Grid) -> Tensor:
        return affine.dequantize(q, *grid.filled())

    def split_bias(
        self, bias: Tensor, input_scale: Tensor, weight_scale: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        return bias, None

    def requantize(
        self, acc: Tensor, bias: Tensor | None, input_scale: Tensor, weight_scale: Tensor, grid: Grid, attrs: Attrs
    ) -> Tensor:
        multiplier = (input_scale * weight_scale) / grid.filled()[0]
        return round_outside(acc.to(torch.float32).mul_(channels(multiplier, acc)), grid)

    def float_linear(self, acc: Tensor, bias: Tensor | None, input_scale: Tensor, weight_scale: Tensor) -> Tensor:
        raise EdgeqatError(f"{self.name} has no linear layer with float outputs; plan for its runtime")

    def add(self, a: Tensor, a_grid: Grid, b: Tensor, b_grid: Grid, grid: Grid, form: SumForm | None = None) -> Tensor:
        (s_a, z_a), (s_b, z_b), (s, z) = a_grid.filled(), b_grid.filled(), grid.filled()
        ratios = [float(s_a / s), float(s_b / s)]
        shift = ADD_BITS - (math.frexp(max(ratios))[1] - 1)  # frexp's exponent is floor(log2) + 1
        m_a, m_b = (round(math.ldexp(ratio, shift)) for ratio in ratios)
        total = (a - z_a).double() * m_a + (b - z_b).double() * m_b  # below 2**32: exact
        rounded = torch.floor(total * 2.0**-shift + 0.5)
        return (rounded + z).clamp_(grid.qmin, grid.qmax).to(torch.float32)

    def mul(self, a: Tensor, a_grid: Grid, b: Tensor, b_grid: Grid, grid: Grid) -> Tensor:
        (s_a, z_a), (s_b, z_b), (s, _) = a_grid.filled(), b_grid.filled(), grid.filled()
        return round_outside((a - z_a) * (b - z_b) * ((s_a * s_b) / s), grid)

    def change_grid(self, q: Tensor, q_grid: Grid, grid: Grid, dim: int) -> Tensor:
        return self.mul(q, q_grid, torch.ones(()), ONE, grid)

    def global_average_pool(self, q: Tensor, q_grid: Grid, grid: Grid) -> Tensor:
        n, zero = q.shape[-2] * q.shape[-1], (q_grid.filled()[1] - INT8_SHIFT).float()
        inverse = torch.tensor(1.0) / n
        total = (q.double() - INT8_SHIFT).sum(dim=(-2, -1), keepdim=True).float()
        mean = torch.round(total * inverse + (zero - (zero * n) * inverse))
        return (mean + INT8_SHIFT).clamp_(grid.qmin, grid.qmax)

    def average_pool(self, q: Tensor, q_grid: Grid, grid: Grid, attrs: AveragePoolAttrs) -> Tensor:
        assert attrs.kernel is not None
        (s_x, z_x), (s, _) = q_grid.filled(), grid.filled()
        total, count = window_sums(q - z_x, attrs)
        return round_outside(total * ((s_x * (1 / count)) / s), grid)
