"""ONNX Runtime's CPU arithmetic on 64-bit ARM ("onnxruntime/arm64"), with and without the dot product instructions.

As "onnxruntime/x86" in everything but sums and products:

    add           with r = s / s_y, m = rne(r * 2**shift), shift = 21 - floor(log2(max(r_a, r_b))):
                  ((a - z_a) * m_a + (b - z_b) * m_b) / 2**shift, rounded half away from zero, + z
                  where max(r_a, r_b) >= 2**8, or a multiplier is rounded up to 2**22, in float32:
                  rne(fma(a - z_a, s_a, (b - z_b) * s_b) / s_y + z)
    mul           rne(fma((a - z_a) * (b - z_b), (s_a * s_b) / s_y, z))

Kernels of ARM add no pairs of products in 16 bits, so that nothing saturates.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from edgeqat.interpreter.arithmetic.base import fma
from edgeqat.interpreter.arithmetic.onnxruntime import OnnxRuntimeX86, is_repeated
from edgeqat.interpreter.sum_forms import SumForm
from edgeqat.program import Grid

__all__ = ["OnnxRuntimeArm64"]

ADD_BITS = 21
"""Bits of the larger multiplier of an addition behind its first."""

LARGEST_RATIO = 2.0**8
"""Of an input's scale to the output's, in fixed point."""


class OnnxRuntimeArm64(OnnxRuntimeX86):
    """See the head of this file."""

    name = "onnxruntime/arm64"

    def add(self, a: Tensor, a_grid: Grid, b: Tensor, b_grid: Grid, grid: Grid, form: SumForm | None = None) -> Tensor:
        if is_repeated(a, b):
            a, a_grid, b, b_grid = b, b_grid, a, a_grid
        (s_a, z_a), (s_b, z_b), (s, z) = a_grid.filled(), b_grid.filled(), grid.filled()
        a, b = a - z_a, b - z_b
        r_a, r_b = float(s_a / s), float(s_b / s)
        shift = ADD_BITS - math.frexp(max(r_a, r_b))[1] + 1  # frexp's exponent is floor(log2) + 1
        m_a, m_b = (round(math.ldexp(r, shift)) for r in (r_a, r_b))
        if max(r_a, r_b) >= LARGEST_RATIO or max(m_a, m_b) == 2 ** (ADD_BITS + 1):
            return (fma(a, s_a, b * s_b) / s + z).round_().clamp_(grid.qmin, grid.qmax)
        total = a.double() * m_a + b.double() * m_b  # below 2**31: exact
        rounded = total.sign() * torch.floor(total.abs() / 2.0**shift + 0.5)
        return (rounded + z).clamp_(grid.qmin, grid.qmax).to(torch.float32)

    def mul(self, a: Tensor, a_grid: Grid, b: Tensor, b_grid: Grid, grid: Grid) -> Tensor:
        (s_a, z_a), (s_b, z_b), (s, z) = a_grid.filled(), b_grid.filled(), grid.filled()
        product = (a - z_a) * (b - z_b)  # at most 16 bits: exact
        return fma(product, (s_a * s_b) / s, z).round_().clamp_(grid.qmin, grid.qmax)
