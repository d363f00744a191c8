"""The arithmetics of torch's INT8 kernels: "fbgemm", "onednn" and "x86" (AVX512-VNNI), and "qnnpack" (any x86).

Float32 throughout; rne is round half to even; z is the output's zero point; everything is clamped to its bounds. All
take a float bias b = fp32(bias * (s_x * s_w)). A scale inverted twice is not what it was: t(s) = 1 / (1 / s).

    quantize      rne(fma(x, 1 / s, z))

    conv, linear
      fbgemm      rne((fp32(acc) + b / s_xw) * (s_xw / s_y)) + z, s_xw = s_x * s_w; with one s_w for all channels
                  rne(fma(b, 1 / s_xw, fp32(acc)) * (s_xw / s_y)) + z
      onednn      rne((fp32(acc) * t(s_x) * s_w + b) * (1 / s_y) + z), step by step; in a linear layer t(s_w)
      x86         onednn's for a conv of up to 100 groups, else fbgemm's
      qnnpack     rne(fp32(acc + rne(b * (1 / s_xw))) * (s_xw * (1 / s_y))) + z

    pools, which keep their input's grid (z, s)
      global      rne(fma(sum(x - z), 1 / n, z)): files keep images channels last, whose kernel it is
      windows     m = sum(x - z) * (1 / n); in blocks of 16 channels rne(m) + z, in those left over rne(m + z)
      qnnpack     rne(sum(x - z) * (s / (s * n))) + z, for both

    mul           rne(fp32((a - z_a) * (b - z_b)) * ((s_a * s_b) * (1 / s_y))) + z
    concat        each input dequantized, then quantized; but of 4-d values along the channels, which are last in
                  memory, in blocks of 8 channels of an input rne(fma(s_x, q, -s_x * z_x) * (1 / s_y)) + z
                  in those left over rne((q - z_x) * s_x * (1 / s_y) + z)

    add           in blocks of 64 elements in the order of memory (channels last)
                      rne((fma(s_a, a, -s_a * z_a) + fma(s_b, b, -s_b * z_b)) * (1 / s_y)) + z
                  in those left over at the end of the tensor
                      rne(((a - z_a) * s_a + (b - z_b) * s_b) * (1 / s_y) + z)
                  More than one thread makes more ends, so that it holds for one.
      qnnpack     fixed point: with r = s / s_y, shift = 21 - floor(log2(max(r_a, r_b))), m = rne(r * 2**shift),
                  ((a - z_a) * m_a + (b - z_b) * m_b) / 2**shift is rounded half away from zero

fbgemm's depthwise kernels add pairs of products in 16 bits, on every processor: weights within +-63 keep them from
saturating.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from edgeqat import affine
from edgeqat.errors import EdgeqatError
from edgeqat.interpreter.arithmetic.base import channels, fma, round_outside, window_sums
from edgeqat.interpreter.sum_forms import SumForm
from edgeqat.op_attrs import Attrs, AveragePoolAttrs, ConvAttrs
from edgeqat.program import Grid

__all__ = ["Fbgemm", "Onednn", "Qnnpack", "X86"]

ADD_BLOCK = 64
"""uint8 elements in an AVX512 register."""

CONCAT_BLOCK = 8
"""Channels that a concatenation computes together."""

POOL_BLOCK = 16
"""float32 elements in an AVX512 register."""

ADD_BITS = 21
"""qnnpack's multipliers of an addition have one bit more."""

ONEDNN_GROUPS = 100
"""The engine x86 gives a conv of more groups to fbgemm."""


class _TorchInt8:
    """What the engines share."""

    name = ""
    add_block = 1
    fuses_sums = False
    dequantize_block = 1

    def quantize(self, x: Tensor, grid: Grid) -> Tensor:
        scale, zero_point = grid.filled()
        return torch.round(fma(x, 1 / scale, zero_point)).clamp_(grid.qmin, grid.qmax)

    def dequantize(self, q: Tensor, grid: Grid) -> Tensor:
        scale, zero_point = grid.filled()
        return affine.dequantize(q, scale, zero_point)

    def mul(self, a: Tensor, a_grid: Grid, b: Tensor, b_grid: Grid, grid: Grid) -> Tensor:
        (s_a, z_a), (s_b, z_b), (s, _) = a_grid.filled(), b_grid.filled(), grid.filled()
        return round_outside((a - z_a) * (b - z_b) * ((s_a * s_b) * (1 / s)), grid)

    def change_grid(self, q: Tensor, q_grid: Grid, grid: Grid, dim: int) -> Tensor:
        if q.dim() != 4 or dim != 1:
            return self.quantize(self.dequantize(q, q_grid), grid)
        (s_x, z_x), (s, z) = q_grid.filled(), grid.filled()
        blocks = q.shape[1] - q.shape[1] % CONCAT_BLOCK
        vectors = round_outside(fma(s_x, q[:, :blocks], -s_x * z_x) * (1 / s), grid)
        rest = torch.round((q[:, blocks:] - z_x) * s_x * (1 / s) + z).clamp_(grid.qmin, grid.qmax)
        return torch.cat([vectors, rest], 1)

    def float_linear(self, acc: Tensor, bias: Tensor | None, input_scale: Tensor, weight_scale: Tensor) -> Tensor:
        raise EdgeqatError(f"{self.name} has no linear layer with float outputs; plan for torchscript")


class _Native(_TorchInt8):
    """The engines whose additions and pools are torch's own kernels."""

    add_block = ADD_BLOCK

    def split_bias(
        self, bias: Tensor, input_scale: Tensor, weight_scale: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        return None, affine.float_bias(bias, input_scale, weight_scale)

    def add(self, a: Tensor, a_grid: Grid, b: Tensor, b_grid: Grid, grid: Grid, form: SumForm | None = None) -> Tensor:
        (s_a, z_a), (s_b, z_b), (s, z) = a_grid.filled(), b_grid.filled(), grid.filled()
        reciprocal = 1 / s
        block = (fma(s_a, a, -s_a * z_a) + fma(s_b, b, -s_b * z_b)) * reciprocal
        rest = ((a - z_a) * s_a + (b - z_b) * s_b) * reciprocal
        inside = torch.round(rest + z).clamp_(grid.qmin, grid.qmax)
        return _join(round_outside(block, grid), inside)

    def global_average_pool(self, q: Tensor, q_grid: Grid, grid: Grid) -> Tensor:
        _, zero_point = q_grid.filled()
        total = (q - zero_point).double().sum(dim=(-2, -1), keepdim=True).to(torch.float32)
        n = torch.tensor(float(q.shape[-2] * q.shape[-1]))
        return fma(total, 1 / n, zero_point).round_().clamp_(grid.qmin, grid.qmax)

    def average_pool(self, q: Tensor, q_grid: Grid, grid: Grid, attrs: AveragePoolAttrs) -> Tensor:
        _, zero_point = q_grid.filled()
        total, count = window_sums(q - zero_point, attrs)
        mean = total * (1 / count)
        blocks = q.shape[1] - q.shape[1] % POOL_BLOCK
        inside = torch.round(mean[:, blocks:] + zero_point).clamp_(grid.qmin, grid.qmax)
        return torch.cat([round_outside(mean[:, :blocks], grid), inside], 1)


class Fbgemm(_Native):
    """See the head of this file."""

    name = "fbgemm"

    def requantize(
        self, acc: Tensor, bias: Tensor | None, input_scale: Tensor, weight_scale: Tensor, grid: Grid, attrs: Attrs
    ) -> Tensor:
        scale, _ = grid.filled()
        product = input_scale * weight_scale
        total = acc.to(torch.float32)
        if bias is not None and product.dim():
            total = total.add_(channels(bias / product, acc))
        elif bias is not None:
            total = fma(channels(bias, acc), 1 / product, total)
        return round_outside(total.mul_(channels(product / scale, acc)), grid)


class Onednn(_Native):
    """See the head of this file."""

    name = "onednn"

    def requantize(
        self, acc: Tensor, bias: Tensor | None, input_scale: Tensor, weight_scale: Tensor, grid: Grid, attrs: Attrs
    ) -> Tensor:
        scale, zero_point = grid.filled()
        weight = weight_scale if isinstance(attrs, ConvAttrs) else _twice_inverted(weight_scale)
        real = acc.to(torch.float32).mul_(_twice_inverted(input_scale)).mul_(channels(weight, acc))
        if bias is not None:
            real = real.add_(channels(bias, acc))
        return real.mul_(1 / scale).add_(zero_point).round_().clamp_(grid.qmin, grid.qmax)


class X86(_Native):
    """See the head of this file."""

    name = "x86"

    def __init__(self) -> None:
        self._onednn, self._fbgemm = Onednn(), Fbgemm()

    def requantize(
        self, acc: Tensor, bias: Tensor | None, input_scale: Tensor, weight_scale: Tensor, grid: Grid, attrs: Attrs
    ) -> Tensor:
        to_onednn = isinstance(attrs, ConvAttrs) and attrs.groups <= ONEDNN_GROUPS
        engine = self._onednn if to_onednn else self._fbgemm
        return engine.requantize(acc, bias, input_scale, weight_scale, grid, attrs)


class Qnnpack(_TorchInt8):
    """See the head of this file."""

    name = "qnnpack"

    def split_bias(
        self, bias: Tensor, input_scale: Tensor, weight_scale: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        real = affine.float_bias(bias, input_scale, weight_scale)
        return torch.round(real * (1 / (input_scale * weight_scale))), None

    def requantize(
        self, acc: Tensor, bias: Tensor | None, input_scale: Tensor, weight_scale: Tensor, grid: Grid, attrs: Attrs
    ) -> Tensor:
        scale, _ = grid.filled()
        multiplier = (input_scale * weight_scale) * (1 / scale)
        return round_outside(acc.to(torch.float32).mul_(channels(multiplier, acc)), grid)

    def add(self, a: Tensor, a_grid: Grid, b: Tensor, b_grid: Grid, grid: Grid, form: SumForm | None = None) -> Tensor:
        (s_a, z_a), (s_b, z_b), (s, z) = a_grid.filled(), b_grid.filled(), grid.filled()
        r_a, r_b = float(s_a / s), float(s_b / s)
        shift = ADD_BITS - math.frexp(max(r_a, r_b))[1] + 1  # frexp's exponent is floor(log2) + 1
        m_a, m_b = (round(math.ldexp(r, shift)) for r in (r_a, r_b))
        total = (a - z_a).double() * m_a + (b - z_b).double() * m_b  # below 2**32: exact
        rounded = total.sign() * torch.floor(total.abs() / 2.0**shift + 0.5)
        return (rounded + z).clamp_(grid.qmin, grid.qmax).to(torch.float32)

    def global_average_pool(self, q: Tensor, q_grid: Grid, grid: Grid) -> Tensor:
        scale, zero_point = q_grid.filled()
        total = (q - zero_point).double().sum(dim=(-2, -1), keepdim=True).to(torch.float32)
        return round_outside(total * (scale / (scale * (q.shape[-2] * q.shape[-1]))), grid)

    def average_pool(self, q: Tensor, q_grid: Grid, grid: Grid, attrs: AveragePoolAttrs) -> Tensor:
        scale, zero_point = q_grid.filled()
        total, count = window_sums(q - zero_point, attrs)
        return round_outside(total * (scale / (scale * count)), grid)


def _twice_inverted(scale: Tensor) -> Tensor:
    return 1 / (1 / scale)


def _join(blocks: Tensor, rest: Tensor) -> Tensor:
    """`rest` for the last elements in memory that fill no block, `blocks` for all others."""
    left_over = blocks.numel() % ADD_BLOCK
    if left_over == 0:
        return blocks
    result = blocks.contiguous(memory_format=_memory_format(blocks))
    # as_strided on the dense storage is its order in memory.
    flat = result.as_strided((result.numel(),), (1,))
    other = rest.contiguous(memory_format=_memory_format(rest)).as_strided((rest.numel(),), (1,))
    flat[-left_over:] = other[-left_over:]
    return result


def _memory_format(x: Tensor) -> torch.memory_format:
    return torch.channels_last if x.dim() == 4 else torch.contiguous_format
