"""ONNX Runtime's CPU arithmetic on x86, with VNNI ("onnxruntime/x86") and without it ("onnxruntime/x86-avx2").

Float32 throughout; rne is round half to even; z, lo, hi are the output's zero point and bounds:

    quantize      rne(clamp(x / s, lo - z, hi - z)) + z, true division
    conv, linear  rne(clamp(fp32(acc + bias) * ((s_x * s_w) / s_y), lo - z, hi - z)) + z
    float linear  fp32(acc + bias) * (s_x * s_w)
    add           rne(fma(a, r_a, fma(b, r_b, z - fma(r_a, z_a, r_b * z_b)))), r = s / s_y: the zero point is
                  inside the rounding, and the compiler fused one product of the offset
                  where a is repeated along the last dimensions and b is not, their roles are swapped
    mul           rne(fp32((a - z_a) * (b - z_b)) * ((s_a * s_b) / s_y) + z), step by step
    matmul        as conv, without a bias
    concat        each input dequantized, then quantized
    global pool   rne(clamp(fp32(sum(x - z_x)) * (s_x / (s_y * n)), lo - z, hi - z)) + z
    average pool  dequantize, average in float32 row by row, clamp(rne(mean / s_y + z)): the zero point is inside

Without VNNI, the u8 * s8 products of conv, transposed conv and linear are added in pairs that saturate at 16 bits
(`saturation.py`); all else is the same, depthwise convs and products of two values too.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from edgeqat import affine
from edgeqat.interpreter.arithmetic.base import channels, fma, round_outside
from edgeqat.interpreter.arithmetic.saturation import saturation
from edgeqat.interpreter.sum_forms import SumForm
from edgeqat.op_attrs import Attrs, AveragePoolAttrs
from edgeqat.program import Grid

__all__ = ["OnnxRuntimeX86", "OnnxRuntimeX86Avx2", "is_repeated"]


class OnnxRuntimeX86:
    """With VNNI: see the head of this file."""

    name = "onnxruntime/x86"
    add_block = 1
    fuses_sums = False
    dequantize_block = 1

    def quantize(self, x: Tensor, grid: Grid) -> Tensor:
        scale, zero_point = grid.filled()
        return affine.quantize(x, scale, zero_point, grid.qmin, grid.qmax)

    def dequantize(self, q: Tensor, grid: Grid) -> Tensor:
        scale, zero_point = grid.filled()
        return affine.dequantize(q, scale, zero_point)

    def split_bias(
        self, bias: Tensor, input_scale: Tensor, weight_scale: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        return bias, None

    def requantize(
        self, acc: Tensor, bias: Tensor | None, input_scale: Tensor, weight_scale: Tensor, grid: Grid, attrs: Attrs
    ) -> Tensor:
        scale, _ = grid.filled()
        multiplier = (input_scale * weight_scale) / scale
        return round_outside(acc.to(torch.float32).mul_(channels(multiplier, acc)), grid)

    def float_linear(self, acc: Tensor, bias: Tensor | None, input_scale: Tensor, weight_scale: Tensor) -> Tensor:
        return acc.to(torch.float32) * channels(input_scale * weight_scale, acc)

    def add(self, a: Tensor, a_grid: Grid, b: Tensor, b_grid: Grid, grid: Grid, form: SumForm | None = None) -> Tensor:
        if is_repeated(a, b):
            a, a_grid, b, b_grid = b, b_grid, a, a_grid
        (s_a, z_a), (s_b, z_b), (s, z) = a_grid.filled(), b_grid.filled(), grid.filled()
        r_a, r_b = s_a / s, s_b / s
        offset = z - fma(z_a, r_a, r_b * z_b)
        return fma(a, r_a, fma(b, r_b, offset)).round_().clamp_(grid.qmin, grid.qmax)

    def mul(self, a: Tensor, a_grid: Grid, b: Tensor, b_grid: Grid, grid: Grid) -> Tensor:
        (s_a, z_a), (s_b, z_b), (s, z) = a_grid.filled(), b_grid.filled(), grid.filled()
        product = (a - z_a) * (b - z_b)  # at most 16 bits: exact
        return (product * ((s_a * s_b) / s) + z).round_().clamp_(grid.qmin, grid.qmax)

    def change_grid(self, q: Tensor, q_grid: Grid, grid: Grid, dim: int) -> Tensor:
        return self.quantize(self.dequantize(q, q_grid), grid)

    def global_average_pool(self, q: Tensor, q_grid: Grid, grid: Grid) -> Tensor:
        (s_x, z_x), (s, _) = q_grid.filled(), grid.filled()
        total = (q - z_x).double().sum(dim=(-2, -1), keepdim=True)
        n = q.shape[-2] * q.shape[-1]
        return round_outside(total.to(torch.float32) * (s_x / (s * n)), grid)

    def average_pool(self, q: Tensor, q_grid: Grid, grid: Grid, attrs: AveragePoolAttrs) -> Tensor:
        scale, zero_point = grid.filled()
        assert attrs.kernel is not None
        real = self.dequantize(q, q_grid)
        mean = F.avg_pool2d(real, attrs.kernel, attrs.stride, attrs.padding, count_include_pad=attrs.count_include_pad)
        return torch.round(mean / scale + zero_point).clamp_(grid.qmin, grid.qmax)


class OnnxRuntimeX86Avx2(OnnxRuntimeX86):
    """With AVX2 or AVX512, but without VNNI: pairs of products saturate."""

    name = "onnxruntime/x86-avx2"

    def saturation(self, q: Tensor, grid: Grid, weight: Tensor, attrs: Attrs) -> Tensor | None:
        return saturation(q, grid, weight, attrs)


def is_repeated(a: Tensor, b: Tensor) -> bool:
    """Whether each element of a meets a run of elements of b: a has size 1 in the last dimension where not both do."""
    ranks = range(1, max(a.dim(), b.dim()) + 1)
    sizes = ((a.shape[-i] if i <= a.dim() else 1, b.shape[-i] if i <= b.dim() else 1) for i in ranks)
    return next((size == 1 for size, other in sizes if (size, other) != (1, 1)), False)
