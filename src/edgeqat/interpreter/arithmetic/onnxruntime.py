"""ONNX Runtime's CPU arithmetic on x86 with VNNI ("onnxruntime/x86").

Float32 throughout; rne is round half to even; z, lo, hi are the output's zero point and bounds:

    quantize      rne(clamp(x / s, lo - z, hi - z)) + z, true division
    conv, linear  rne(clamp(fp32(acc) * ((s_x * s_w) / s_y), lo - z, hi - z)) + z
    float linear  fp32(acc) * (s_x * s_w)
    add           rne(fma(a, r_a, fma(b, r_b, z - fma(r_a, z_a, r_b * z_b)))), r = s / s_y: the zero point is
                  inside the rounding, and the compiler fused one product of the offset
    global pool   rne(clamp(fp32(sum(x - z_x)) * (s_x / (s_y * n)), lo - z, hi - z)) + z
    average pool  dequantize, average in float32 row by row, clamp(rne(mean / s_y + z)): the zero point is inside

Without VNNI, x86 kernels saturate pairs of u8 * s8 products at 16 bits and this arithmetic does not hold.
"""

from __future__ import annotations

import torch
from torch import Tensor

from edgeqat import affine
from edgeqat.program import Grid

__all__ = ["OnnxRuntimeX86"]


class OnnxRuntimeX86:
    """See the head of this file."""

    name = "onnxruntime/x86"

    def quantize(self, x: Tensor, grid: Grid) -> Tensor:
        scale, zero_point = grid.filled()
        return affine.quantize(x, scale, zero_point, grid.qmin, grid.qmax)

    def dequantize(self, q: Tensor, grid: Grid) -> Tensor:
        scale, zero_point = grid.filled()
        return affine.dequantize(q, scale, zero_point)

    def requantize(self, acc: Tensor, input_scale: Tensor, weight_scale: Tensor, grid: Grid) -> Tensor:
        scale, _ = grid.filled()
        multiplier = (input_scale * weight_scale) / scale
        return _round_to(acc.to(torch.float32) * _channels(multiplier, acc), grid)

    def float_linear(self, acc: Tensor, input_scale: Tensor, weight_scale: Tensor) -> Tensor:
        return acc.to(torch.float32) * _channels(input_scale * weight_scale, acc)

    def add(self, a: Tensor, a_grid: Grid, b: Tensor, b_grid: Grid, grid: Grid) -> Tensor:
        (s_a, z_a), (s_b, z_b), (s, z) = a_grid.filled(), b_grid.filled(), grid.filled()
        r_a, r_b = s_a / s, s_b / s
        offset = z - _fma(z_a, r_a, r_b * z_b)
        return torch.round(_fma(a, r_a, _fma(b, r_b, offset))).clamp_(grid.qmin, grid.qmax)

    def global_average_pool(self, q: Tensor, q_grid: Grid, grid: Grid) -> Tensor:
        (s_x, z_x), (s, _) = q_grid.filled(), grid.filled()
        total = (q - z_x).double().sum(dim=(-2, -1), keepdim=True)
        n = q.shape[-2] * q.shape[-1]
        return _round_to(total.to(torch.float32) * (s_x / (s * n)), grid)

    def average_pool(self, x: Tensor, grid: Grid) -> Tensor:
        scale, zero_point = grid.filled()
        return torch.round(x / scale + zero_point).clamp_(grid.qmin, grid.qmax)


def _fma(integer: Tensor, ratio: Tensor, addend: Tensor) -> Tensor:
    """integer * ratio + addend, rounded to float32 once: float64 holds the product of 8 and 24 bits exactly."""
    return (integer.double() * ratio.double() + addend.double()).to(torch.float32)


def _channels(multiplier: Tensor, acc: Tensor) -> Tensor:
    return affine.broadcast(multiplier, 1 if multiplier.dim() else None, acc.dim())


def _round_to(x: Tensor, grid: Grid) -> Tensor:
    _, zero_point = grid.filled()
    z = int(zero_point)
    return torch.round(torch.clamp(x, grid.qmin - z, grid.qmax - z)) + z
