"""The arithmetic of OpenVINO's CPU plugin in INT8, on x86 with AVX512-VNNI ("openvino/x86").

Float32 throughout; rne is round half to even; everything is clamped to its grid. A quantization is the plugin's
FakeQuantize over [lo, hi] = [s * (0 - z), s * (255 - z)], with i = 255 / (hi - lo), so that i is near 1 / s and
its shift near z, but neither is exactly that.

    quantize      rne(x * i - lo * i), step by step

    conv          r = fp32(acc) * (s_x * s_w) + b, step by step
                  z = 0: rne(r * (1 / (1 / i)));   else rne(fma(r, i, -lo * 255 / (hi - lo)))
                  without a bias lo and hi are divided by s_x * s_w for each channel: rne(fp32(acc) * i + shift)
    linear        rne(fp32(acc) * ((s_x * s_w) * i) + (b * i + shift)), step by step
                  with float outputs r of conv

    pools         with lo and hi divided by s_x: rne(fma(sum(x) * (1 / n), i, shift - z_x * i))

    add           see `sum_forms`; with r = s_a / s_b, z' = z_a + z_b * s_b / s_a, and lo and hi divided by s_b
                  the sum is fma(a - z', r, b), step by step where a layer of its own brings a to b's scale;
                  where a's own quantization does that, a is
                  fma(a, t, -z' * r), t = ((255 - z') * r + z' * r) / 255
                  where a conv's kernel adds, a is not rounded: clamp(fma(r_conv, i_a * t, shift_a * t - z' * r))
                  the sum is quantized as a conv's result there, else as in quantize
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from edgeqat import affine
from edgeqat.errors import EdgeqatError
from edgeqat.interpreter.arithmetic.base import channels, fma, window_sums
from edgeqat.interpreter.sum_forms import SumForm
from edgeqat.op_attrs import Attrs, AveragePoolAttrs, LinearAttrs
from edgeqat.program import Grid

__all__ = ["OpenVinoX86"]

STEPS = torch.tensor(255.0)
"""levels - 1. A tensor: torch turns a Python number over a tensor into a product with the reciprocal."""

NEGLIGIBLE = 1e-5
"""Of the range: a shift below this is dropped."""

ALIKE = 5e-5
"""Shifts of channels that differ by less are taken for one."""


@dataclass(frozen=True)
class _Fake:
    """A FakeQuantize: x * scale + shift, in steps.

    Attributes:
        scale: 0-d or [C].
        shift: 0-d or [C].
        low: Where it clamps, in the unit of x.
        high: Likewise.
    """

    scale: Tensor
    shift: Tensor
    low: Tensor
    high: Tensor

    @staticmethod
    def of(grid: Grid, unit: Tensor | None = None, offset: Tensor | None = None) -> _Fake:
        """That of a grid, over values in `unit`s."""
        scale, zero_point = grid.filled()
        low, high = scale * (0 - zero_point), scale * (STEPS - zero_point)
        if unit is not None:
            low, high = low / unit, high / unit
        return _Fake(STEPS / (high - low), -low * STEPS / (high - low), low, high)

    def in_kernel(self, x: Tensor) -> Tensor:
        """As a kernel's last step computes it, before rounding."""
        if bool(self.shift.abs() < STEPS * NEGLIGIBLE):
            return x * (1 / (1 / self.scale))
        return fma(x, self.scale, self.shift)

    def on_its_own(self, x: Tensor) -> Tensor:
        """As a generated elementwise kernel computes it, before rounding."""
        return x * self.scale - self.low * self.scale


def _rounded(x: Tensor, grid: Grid) -> Tensor:
    return torch.round(x).clamp_(grid.qmin, grid.qmax)


class OpenVinoX86:
    """See the head of this file."""

    name = "openvino/x86"
    add_block = 1
    dequantize_block = 1
    fuses_sums = True

    def quantize(self, x: Tensor, grid: Grid) -> Tensor:
        return _rounded(_Fake.of(grid).on_its_own(x), grid)

    def dequantize(self, q: Tensor, grid: Grid) -> Tensor:
        scale, zero_point = grid.filled()
        return affine.dequantize(q, scale, zero_point)

    def split_bias(
        self, bias: Tensor, input_scale: Tensor, weight_scale: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        return None, affine.float_bias(bias, input_scale, weight_scale)

    def requantize(
        self, acc: Tensor, bias: Tensor | None, input_scale: Tensor, weight_scale: Tensor, grid: Grid, attrs: Attrs
    ) -> Tensor:
        product = input_scale * weight_scale
        if bias is None or not bool(bias.any()):
            return _rounded(_without_bias(acc.to(torch.float32), product, grid), grid)
        if isinstance(attrs, LinearAttrs):
            fake = _Fake.of(grid)
            folded = bias * fake.scale + fake.shift
            return _rounded(acc.to(torch.float32) * channels(product * fake.scale, acc) + channels(folded, acc), grid)
        return _rounded(_Fake.of(grid).in_kernel(self.float_linear(acc, bias, input_scale, weight_scale)), grid)

    def float_linear(self, acc: Tensor, bias: Tensor | None, input_scale: Tensor, weight_scale: Tensor) -> Tensor:
        real = acc.to(torch.float32) * channels(input_scale * weight_scale, acc)
        return real if bias is None else real + channels(bias, acc)

    def add(self, a: Tensor, a_grid: Grid, b: Tensor, b_grid: Grid, grid: Grid, form: SumForm | None = None) -> Tensor:
        assert form is not None
        if form.scaled == 1:
            a, a_grid, b, b_grid = b, b_grid, a, a_grid
        (s_a, z_a), (s_b, z_b) = a_grid.filled(), b_grid.filled()
        ratio, zero_point = s_a / s_b, z_a + (z_b * s_b) / s_a
        fake = _Fake.of(grid, s_b)
        if not form.requantized:
            total = (a - zero_point) * ratio + b if form.apart else fma(a - zero_point, ratio, b)
            return _rounded(fake.on_its_own(total), grid)
        bottom, top = (0 - zero_point) * ratio, (STEPS - zero_point) * ratio
        step = (top - bottom) / STEPS
        if form.conv is None:
            return _rounded(fake.on_its_own(fma(a, step, bottom) + b), grid)
        own = _Fake.of(a_grid, form.unit)
        if form.merged:
            return _rounded(fake.in_kernel(_clamped(a, own, step, bottom) + b), grid)
        return _rounded(fake.on_its_own(_requantized(a, own, step, bottom) + b), grid)

    def mul(self, a: Tensor, a_grid: Grid, b: Tensor, b_grid: Grid, grid: Grid) -> Tensor:
        raise EdgeqatError(f"{self.name} has no known product; plan for openvino")

    def change_grid(self, q: Tensor, q_grid: Grid, grid: Grid, dim: int) -> Tensor:
        raise EdgeqatError(f"{self.name} has no known concatenation; plan for openvino")

    def global_average_pool(self, q: Tensor, q_grid: Grid, grid: Grid) -> Tensor:
        total = q.double().sum(dim=(-2, -1), keepdim=True).to(torch.float32)
        return _rounded(_pooled(total, torch.tensor(float(q.shape[-2] * q.shape[-1])), q_grid, grid), grid)

    def average_pool(self, q: Tensor, q_grid: Grid, grid: Grid, attrs: AveragePoolAttrs) -> Tensor:
        _, z_x = q_grid.filled()
        total, count = window_sums(q - z_x, attrs)
        return _rounded(_pooled(total + z_x * count, count, q_grid, grid), grid)


def _pooled(total: Tensor, count: Tensor, q_grid: Grid, grid: Grid) -> Tensor:
    """The mean of integers whose zero point has not been taken off: that is part of the shift."""
    s_x, z_x = q_grid.filled()
    fake = _Fake.of(grid, s_x)
    return replace(fake, shift=fake.shift - z_x * fake.scale).in_kernel(total * (1 / count))


def _without_bias(acc: Tensor, product: Tensor, grid: Grid) -> Tensor:
    """A conv without a bias: its scale is divided out of the quantization, for each channel."""
    fake = _Fake.of(grid, product)
    if fake.scale.dim() == 0:
        return fake.in_kernel(acc)
    return _linear(acc, fake.scale, _alike(fake.shift))


def _clamped(sums: Tensor, own: _Fake, step: Tensor, bottom: Tensor) -> Tensor:
    """What a conv adds inside its kernel: its quantization but for the rounding, in the other value's steps.

    Args:
        sums: In the unit of `own`.
        own: The conv's quantization.
        step: What one of its integers is worth.
        bottom: What its integer 0 is worth.
    """
    scale, shift = own.scale * step, _alike(own.shift) * step + bottom
    low, high = (torch.round(end * own.scale + own.shift) * step + bottom for end in (own.low, own.high))
    if shift.dim() == 0 and bool(shift.abs() < (high.max() - low.min()) * NEGLIGIBLE):
        shift = torch.zeros_like(shift)
    return torch.minimum(torch.maximum(_linear(sums, scale, shift), channels(low, sums)), channels(high, sums))


def _requantized(sums: Tensor, own: _Fake, step: Tensor, bottom: Tensor) -> Tensor:
    """What a conv gives an addition behind it: its integers, in the other value's steps; arguments of `_clamped`."""
    shift = _alike(own.shift)
    if float(step) == 1 and float(bottom) == math.trunc(float(bottom)):
        # Only the offset is left to do, which then is inside the rounding.
        return torch.round(_linear(sums, own.scale, shift + bottom)).clamp_(float(bottom), float(STEPS + bottom))
    if shift.dim() == 0 and bool(shift.abs() < STEPS * NEGLIGIBLE):
        shift = torch.zeros_like(shift)
    return fma(torch.round(_linear(sums, own.scale, shift)).clamp_(0, float(STEPS)), step, bottom)


def _linear(sums: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """In one step where one scale is for all channels, else in two."""
    if scale.dim() == 0:
        return fma(sums, scale, shift)
    return sums * channels(scale, sums) + channels(shift, sums)


def _alike(shift: Tensor) -> Tensor:
    """The shifts of channels, as one where they are nearly equal."""
    if shift.dim() and bool(((shift - shift[0]).abs() < ALIKE).all()):
        return shift[0]
    return shift
