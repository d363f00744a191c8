"""LiteRT's arithmetics: of its XNNPACK delegate ("litert/xnnpack"), and of its own kernels on x86 ("litert/builtin").

rne is round half to even, up round half up, away round half away from zero; z is the output's zero point, and c an
integer's int8 form, q - 128; everything is clamped to the grid.

xnnpack, float32 throughout:
    quantize      rne(x * (1 / s)) + z
    dequantize    (q - z) * s
    conv, linear  rne(fp32(acc + bias) * ((s_x * s_w) / s_y)) + z
    add           fixed point: with r = s / s_y, shift = 20 - floor(log2(max(r_a, r_b))), m = rne(r * 2**shift),
                  up(((a - z_a) * m_a + (b - z_b) * m_b) / 2**shift) + z
    mul           rne(fp32((a - z_a) * (b - z_b)) * ((s_a * s_b) / s_y)) + z
    global pool   rne(fp32(sum c) * (1 / n) + (c_z - fp32(c_z * n) * (1 / n))), c_z the zero point's int8 form

builtin, integers; a factor f > 0 becomes m * 2**e, m = away(mantissa * 2**31), its inputs' scales multiplied and
divided in float64; x * f is then, in two roundings, h = up(x * 2**max(e, 0) * m / 2**31), and
    vector        up(h / 2**max(-e, 0))
    scalar        away(h / 2**max(-e, 0))
    single        up(x * m * 2**(e - 31)), once
    quantize      as xnnpack
    dequantize    in blocks of 8 elements of the whole tensor fp32(c * s) - fp32(c_z * s), in those left over
                  (q - z) * s
    conv, linear  vector of acc + bias, f = s_x * s_w / s_y; in a depthwise conv vector in blocks of 8 channels and
                  scalar in those left over; scalar in a conv of other groups
    add           t = 2 * max(s_a, s_b); scalar of the sum of singles of (q - z) * 2**20, f = s / t, and for the sum
                  f = t / (2**20 * s_y)
    mul           scalar of (a - z_a) * (b - z_b), f = s_a * s_b / s_y
    global pool   f = fp32(1 / n); of sum c, vector in blocks of 16 channels, scalar in those left over

Both; the delegate leaves these to the builtin kernels, and so it does additions unless 2**-10 <= s / s_y < 2**8 for
both inputs, and products unless 2**-16 <= s_a * s_b / s_y < 2**8:
    average pool  away(sum c / n), n the elements in the window, as integers
    concat        an input on another grid is multiplied by one, which is 1 on a grid of scale 1
"""

from __future__ import annotations

import torch
from torch import Tensor

from edgeqat import affine
from edgeqat.errors import EdgeqatError
from edgeqat.interpreter.arithmetic.base import channels, round_outside, window_sums
from edgeqat.interpreter.arithmetic.xnnpack import INT8_SHIFT, ONE, Xnnpack
from edgeqat.interpreter.sum_forms import SumForm
from edgeqat.op_attrs import Attrs, AveragePoolAttrs, ConvAttrs
from edgeqat.program import Grid

__all__ = ["LiteRTBuiltin", "LiteRTXnnpack"]

ADD_BITS = 20

DEPTHWISE_BLOCK = 8
"""Channels that a depthwise conv of the builtin kernels computes together."""

POOL_BLOCK = 16
"""Channels that their mean computes together."""

LARGEST = 2.0**8
SMALLEST_ADDEND, SMALLEST_FACTOR = 2.0**-10, 2.0**-16
"""What the delegate takes of s / s_y in an addition, and of s_a * s_b / s_y in a product."""


class LiteRTBuiltin:
    """See the head of this file."""

    name = "litert/builtin"
    add_block = 1
    dequantize_block = 8
    fuses_sums = False

    def quantize(self, x: Tensor, grid: Grid) -> Tensor:
        scale, _ = grid.filled()
        return round_outside(x * (1 / scale), grid)

    def split_bias(
        self, bias: Tensor, input_scale: Tensor, weight_scale: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        return bias, None

    def float_linear(self, acc: Tensor, bias: Tensor | None, input_scale: Tensor, weight_scale: Tensor) -> Tensor:
        raise EdgeqatError(f"{self.name} has no linear layer with float outputs; plan for litert")

    def change_grid(self, q: Tensor, q_grid: Grid, grid: Grid, dim: int) -> Tensor:
        return self.mul(q, q_grid, torch.ones(()), ONE, grid)

    def average_pool(self, q: Tensor, q_grid: Grid, grid: Grid, attrs: AveragePoolAttrs) -> Tensor:
        _, zero_point = grid.filled()
        sums, count = window_sums(q - zero_point, attrs)
        total = (sums + count * (zero_point - INT8_SHIFT)).double()
        half = torch.floor(count.double() / 2)  # as integers: in a window of odd size nothing is halfway
        mean = torch.trunc((total + torch.where(total > 0, half, -half)) / count)
        return (mean + INT8_SHIFT).clamp_(grid.qmin, grid.qmax).float()

    def dequantize(self, q: Tensor, grid: Grid) -> Tensor:
        scale, zero_point = grid.filled()
        flat = q.reshape(-1)
        blocks = len(flat) - len(flat) % self.dequantize_block
        vectors = (flat[:blocks] - INT8_SHIFT) * scale - (zero_point - INT8_SHIFT) * scale
        return torch.cat([vectors, affine.dequantize(flat[blocks:], scale, zero_point)]).reshape(q.shape)

    def requantize(
        self, acc: Tensor, bias: Tensor | None, input_scale: Tensor, weight_scale: Tensor, grid: Grid, attrs: Attrs
    ) -> Tensor:
        s, z = grid.filled()
        factor = input_scale.double() * weight_scale.double() / s.double()
        m, e = (channels(part, acc) for part in _fixed_point(factor))
        if not isinstance(attrs, ConvAttrs) or attrs.groups == 1:
            result = _vector(acc.long(), m, e)
        elif attrs.groups == acc.shape[1]:
            result = _in_blocks(acc.long(), m, e, DEPTHWISE_BLOCK)
        else:
            result = _scalar(acc.long(), m, e)
        return (result + z).clamp_(grid.qmin, grid.qmax).float()

    def add(self, a: Tensor, a_grid: Grid, b: Tensor, b_grid: Grid, grid: Grid, form: SumForm | None = None) -> Tensor:
        (s_a, z_a), (s_b, z_b), (s, z) = a_grid.filled(), b_grid.filled(), grid.filled()
        twice = 2 * torch.maximum(s_a, s_b).double()
        left = _single((a.long() - z_a) << ADD_BITS, *_fixed_point(s_a.double() / twice))
        right = _single((b.long() - z_b) << ADD_BITS, *_fixed_point(s_b.double() / twice))
        total = _scalar(left + right, *_fixed_point(twice / (2.0**ADD_BITS * s.double())))
        return (total + z).clamp_(grid.qmin, grid.qmax).float()

    def mul(self, a: Tensor, a_grid: Grid, b: Tensor, b_grid: Grid, grid: Grid) -> Tensor:
        (s_a, z_a), (s_b, z_b), (s, z) = a_grid.filled(), b_grid.filled(), grid.filled()
        factor = s_a.double() * s_b.double() / s.double()
        product = (a.long() - z_a) * (b.long() - z_b)
        return (_scalar(product, *_fixed_point(factor)) + z).clamp_(grid.qmin, grid.qmax).float()

    def global_average_pool(self, q: Tensor, q_grid: Grid, grid: Grid) -> Tensor:
        n = q.shape[-2] * q.shape[-1]
        total = (q.long() - INT8_SHIFT).sum(dim=(-2, -1), keepdim=True)
        mean = _in_blocks(total, *_fixed_point((torch.tensor(1.0) / n).double()), POOL_BLOCK)
        return (mean + INT8_SHIFT).clamp_(grid.qmin, grid.qmax).float()


class LiteRTXnnpack(Xnnpack):
    """XNNPACK's, and LiteRT's own kernels for what the delegate leaves to them."""

    name = "litert/xnnpack"

    def __init__(self) -> None:
        self._builtin = LiteRTBuiltin()

    def add(self, a: Tensor, a_grid: Grid, b: Tensor, b_grid: Grid, grid: Grid, form: SumForm | None = None) -> Tensor:
        (s_a, _), (s_b, _), (s, _) = a_grid.filled(), b_grid.filled(), grid.filled()
        ratios = [float(s_a / s), float(s_b / s)]
        taken = min(ratios) >= SMALLEST_ADDEND and max(ratios) < LARGEST
        return (
            super().add(a, a_grid, b, b_grid, grid, form)
            if taken
            else self._builtin.add(a, a_grid, b, b_grid, grid, form)
        )

    def mul(self, a: Tensor, a_grid: Grid, b: Tensor, b_grid: Grid, grid: Grid) -> Tensor:
        (s_a, _), (s_b, _), (s, _) = a_grid.filled(), b_grid.filled(), grid.filled()
        taken = SMALLEST_FACTOR <= float((s_a * s_b) / s) < LARGEST
        return super().mul(a, a_grid, b, b_grid, grid) if taken else self._builtin.mul(a, a_grid, b, b_grid, grid)

    def average_pool(self, q: Tensor, q_grid: Grid, grid: Grid, attrs: AveragePoolAttrs) -> Tensor:
        return self._builtin.average_pool(q, q_grid, grid, attrs)


def _fixed_point(factor: Tensor) -> tuple[Tensor, Tensor]:
    """(m, e) of float64 factors: integers with factor ~ m * 2**(e - 31), m below 2**31."""
    mantissa, exponent = torch.frexp(factor)
    m = torch.floor(mantissa * 2.0**31 + 0.5).long()
    full = m == 2**31
    m, e = torch.where(full, m // 2, m), exponent.long() + full
    tiny = e < -31
    return torch.where(tiny, 0, m), torch.where(tiny, 0, e)


def _high(x: Tensor, m: Tensor, e: Tensor) -> Tensor:
    """The first of two roundings, half up."""
    return ((x << e.clamp_min(0)) * m + (1 << 30)) >> 31


def _vector(x: Tensor, m: Tensor, e: Tensor) -> Tensor:
    """x * m * 2**(e - 31), rounded twice, half up."""
    shift = (-e).clamp_min(0)
    return (_high(x, m, e) + ((1 << shift) >> 1)) >> shift


def _scalar(x: Tensor, m: Tensor, e: Tensor) -> Tensor:
    """x * m * 2**(e - 31), rounded half up, then half away from zero."""
    high, shift = _high(x, m, e), (-e).clamp_min(0)
    rounded: Tensor = torch.sign(high) * ((high.abs() + ((1 << shift) >> 1)) >> shift)
    return rounded


def _in_blocks(x: Tensor, m: Tensor, e: Tensor, block: int) -> Tensor:
    """`_vector` in whole blocks of channels, `_scalar` in those left over."""
    whole = x.shape[1] - x.shape[1] % block
    vectors, scalars = _vector(x, m, e), _scalar(x, m, e)
    return torch.cat([vectors[:, :whole], scalars[:, whole:]], 1)


def _single(x: Tensor, m: Tensor, e: Tensor) -> Tensor:
    """x * m * 2**(e - 31), rounded once, half up."""
    shift = 31 - e
    return (x * m + (1 << (shift - 1))) >> shift
