"""ONNX Runtime's kernels against the reference, op by op, integer by integer.

A failure here means that the arithmetic written down for the machine is wrong: "onnxruntime/x86", or
"onnxruntime/arm64", whose kernels run too where tools/arm_emulation.py is installed. No tolerance: zero steps.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from edgeqat.interpreter.run import accumulator_bound
from edgeqat.op_attrs import (
    AddAttrs,
    AveragePoolAttrs,
    ConvAttrs,
    LinearAttrs,
    MaxPoolAttrs,
    PadAttrs,
    PermuteAttrs,
    SliceAttrs,
    ViewAttrs,
)
from edgeqat.program import Kind
from helpers import EXACT_ARITHMETIC
from onnx_kernels import check
from programs import grid, on_grid, one_op

pytestmark = [EXACT_ARITHMETIC, pytest.mark.usefixtures("onnx_kernels")]

SCALES = st.floats(2**-13, 1.0, width=32)
ZEROS = st.integers(0, 255)


def integers(seed: int, *shape: int) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed))


def weights(seed: int, *shape: int) -> Tensor:
    return torch.randint(-127, 128, shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=25, deadline=None)
@given(SCALES, SCALES, SCALES, ZEROS, ZEROS, ZEROS)
def test_add_on_all_pairs_of_integers(s_a: float, s_b: float, s_y: float, z_a: int, z_b: int, z_y: int) -> None:
    a, b, y = grid(s_a, z_a), grid(s_b, z_b), grid(s_y, z_y)
    left = torch.arange(256).repeat_interleave(256).reshape(1, -1)
    right = torch.arange(256).repeat(256).reshape(1, -1)
    program = one_op(Kind.ADD, AddAttrs(), [(65536,), (65536,)], [a, b], (65536,), y)
    check(program, [on_grid(a, left), on_grid(b, right)], "QLinearAdd")


def test_add_whose_offset_is_rounded_once() -> None:
    """The offset is z - fma(r_a, z_a, r_b * z_b); rounding both products differs on 2 of these pairs."""
    generator = torch.Generator().manual_seed(1)

    def draw() -> float:
        return float(torch.rand((), generator=generator) * 0.1 + 0.001)

    left = torch.arange(256).repeat_interleave(256).reshape(1, -1)
    right = torch.arange(256).repeat(256).reshape(1, -1)
    for _ in range(6):
        a, b, y = [grid(draw(), int(torch.randint(0, 256, (), generator=generator))) for _ in range(3)]
        program = one_op(Kind.ADD, AddAttrs(), [(65536,), (65536,)], [a, b], (65536,), y)
        check(program, [on_grid(a, left), on_grid(b, right)], "QLinearAdd")


ADD_RATIOS = [(1.0, 0.5), (0.25, 0.5), (0.5, 0.5), (1.0, 0.3), (0.75, 0.25), (300.0, 2.0), (2.0**-12, 0.5)]


@pytest.mark.parametrize("width", [1, 5, 7, 13, 33])
def test_add_of_widths_that_fill_no_vector(width: int) -> None:
    a, b, y = grid(0.02, 100), grid(0.05, 3), grid(0.06, 77)
    program = one_op(Kind.ADD, AddAttrs(), [(width,), (width,)], [a, b], (width,), y)
    check(program, [on_grid(a, integers(0, 999, width)), on_grid(b, integers(1, 999, width))], "QLinearAdd")


@pytest.mark.parametrize("zero_point", [0, 101, 255])
@pytest.mark.parametrize("ratios", ADD_RATIOS, ids=str)
def test_add_on_ties(ratios: tuple[float, float], zero_point: int) -> None:
    """Ratios of scales around those that put sums on ties: multipliers of ARM round, or give way to float32."""
    left = torch.arange(256).repeat_interleave(256).reshape(1, -1)
    right = torch.arange(256).repeat(256).reshape(1, -1)
    for s_y in (0.0625, 0.0731):
        for nudge_a, nudge_b in ((0, 0), (-1, 0), (-2, 0), (-1, -1), (0, -1), (3, -2), (6, 0)):
            scales = [s_y * r * (1 + n * 2.0**-24) for r, n in zip(ratios, (nudge_a, nudge_b), strict=True)]
            a, b, y = grid(scales[0], zero_point), grid(scales[1], 130), grid(s_y, 120)
            program = one_op(Kind.ADD, AddAttrs(), [(65536,), (65536,)], [a, b], (65536,), y)
            check(program, [on_grid(a, left), on_grid(b, right)], "QLinearAdd")


CONVS = {
    "3x3": (16, ConvAttrs((1, 1), ((1, 1), (1, 1)), (1, 1), 1), (32, 16, 3, 3)),
    "1x1": (24, ConvAttrs((1, 1), ((0, 0), (0, 0)), (1, 1), 1), (10, 24, 1, 1)),
    "first layer": (3, ConvAttrs((2, 2), ((1, 1), (1, 1)), (1, 1), 1), (7, 3, 3, 3)),
    "depthwise": (32, ConvAttrs((1, 1), ((1, 1), (1, 1)), (1, 1), 32), (32, 1, 3, 3)),
    "depthwise stride 2": (20, ConvAttrs((2, 2), ((1, 1), (1, 1)), (1, 1), 20), (20, 1, 3, 3)),
    "grouped": (16, ConvAttrs((1, 1), ((1, 1), (1, 1)), (1, 1), 4), (8, 4, 3, 3)),
    "dilated": (8, ConvAttrs((1, 1), ((2, 2), (2, 2)), (2, 2), 1), (8, 8, 3, 3)),
    "asymmetric padding": (8, ConvAttrs((1, 1), ((0, 1), (1, 0)), (1, 1), 1), (8, 8, 2, 2)),
    "beyond 2**24": (520, ConvAttrs((1, 1), ((1, 1), (1, 1)), (1, 1), 1), (4, 520, 3, 3)),
}


@pytest.mark.parametrize("per_channel", [True, False], ids=["per-channel", "per-tensor"])
@pytest.mark.parametrize("zero_point", [0, 131])
@pytest.mark.parametrize("name", CONVS)
def test_conv(name: str, zero_point: int, per_channel: bool) -> None:
    channels, attrs, shape = CONVS[name]
    x = grid(0.031, zero_point)
    w = weights(3, *shape)
    generator = torch.Generator().manual_seed(4)
    scale = torch.rand(shape[0] if per_channel else (), generator=generator) * 0.01 + 1e-3
    fan_in = w[0].numel()
    y = grid(0.031 * 0.006 * 73 * 74 * fan_in**0.5 / 60, 90)
    bias = torch.randint(-20000, 20000, (shape[0],), generator=generator, dtype=torch.int32)
    real = F.conv2d(F.pad(torch.zeros(1, channels, 9, 9), (1, 0, 0, 1)), w.float()) if "asym" in name else None
    out = (
        real
        if real is not None
        else F.conv2d(
            torch.zeros(1, channels, 9, 9),
            w.float(),
            None,
            attrs.stride,
            attrs.padding[0][0],
            attrs.dilation,
            attrs.groups,
        )
    )
    program = one_op(Kind.CONV, attrs, [(channels, 9, 9)], [x], tuple(out.shape[1:]), y, w, scale, bias)
    assert (accumulator_bound(program, program.ops[1]) >= 2**24) == (name == "beyond 2**24")
    check(program, [on_grid(x, integers(5, 20, channels, 9, 9))], "QLinearConv")


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("groups", ["dense", "grouped", "depthwise"])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_conv_of_any_rank_on_ties(dims: int, groups: str, seed: int) -> None:
    """Random kernels, strides, dilations and uneven paddings, with scales that put many results on a tie."""
    draw = torch.Generator().manual_seed(1000 * dims + seed)

    def pick(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=draw))

    count = 1 if groups == "dense" else pick(2, 40 if groups == "depthwise" else 6)
    per_group, outs = (1, 1) if groups == "depthwise" else (pick(1, 20), pick(1, 20))
    kernel, stride, dilation = ([pick(1, high) for _ in range(dims)] for high in (5, 4, 3))
    padding = tuple((pick(0, 3), pick(0, 3)) for _ in range(dims))
    sizes = [max(pick(4, {1: 60, 2: 14, 3: 8}[dims]), d * (k - 1) + 1) for k, d in zip(kernel, dilation, strict=True)]
    attrs = ConvAttrs(tuple(stride), padding, tuple(dilation), count)
    shapes = zip(sizes, padding, kernel, stride, dilation, strict=True)
    out = (count * outs, *((n + sum(p) - d * (k - 1) - 1) // s + 1 for n, p, k, s, d in shapes))
    weight = torch.randint(-20, 21, (count * outs, per_group, *kernel), generator=draw)
    bias = [None, torch.randint(-200, 200, (count * outs,), generator=draw, dtype=torch.int32)][seed % 2]
    x = grid(2.0 ** -pick(0, 9) * 1.1, pick(0, 256))
    scale = 2 ** (torch.randn((count * outs,) if seed % 4 else (), generator=draw) - 6)
    sharp = (x.filled()[0] * scale).flatten()[0]  # this channel's accumulators are divided by 2, 8 or 32 / 3
    y = grid(float(sharp * [2.0, 8.0, 32 / 3][seed % 3]) * (1 + pick(-3, 4) * 2.0**-23), pick(0, 256))
    shape = (count * per_group, *sizes)
    program = one_op(Kind.CONV, attrs, [shape], [x], out, y, weight, scale, bias)
    zero_point = x.per_tensor()[1]
    low, high = max(0, zero_point - 20), min(256, zero_point + 21)
    check(program, [on_grid(x, torch.randint(low, high, (3, *shape), generator=draw))], "QLinearConv")


@pytest.mark.parametrize("dims", [1, 3])
def test_conv_of_any_rank_beyond_2_to_the_24(dims: int) -> None:
    channels, kernel = (1600, 3) if dims == 1 else (200, 3)
    attrs = ConvAttrs((1,) * dims, ((1, 1),) * dims, (1,) * dims, 1)
    x, weight = grid(0.03, 0), weights(12, 3, channels, *[kernel] * dims)
    fan_in = weight[0].numel()
    y = grid(0.03 * 0.005 * 73 * 147 * fan_in**0.5 / 40, 120)
    program = one_op(
        Kind.CONV, attrs, [(channels, *[5] * dims)], [x], (3, *[5] * dims), y, weight, torch.tensor(0.005)
    )
    assert accumulator_bound(program, program.ops[1]) >= 2**24
    check(program, [on_grid(x, integers(13, 4, channels, *[5] * dims))], "QLinearConv")


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("per_channel", [True, False], ids=["per-channel", "per-tensor"])
@pytest.mark.parametrize("gridded", [True, False], ids=["quantized output", "float output"])
@pytest.mark.parametrize("features", [(64, 10), (37, 33), (1280, 16)])
def test_linear(features: tuple[int, int], gridded: bool, per_channel: bool, bias: bool) -> None:
    n_in, n_out = features
    x, w = grid(0.017, 40), weights(6, n_out, n_in)
    generator = torch.Generator().manual_seed(7)
    scale = torch.rand(n_out if per_channel else (), generator=generator) * 0.01 + 1e-3
    values = torch.randint(-9000, 9000, (n_out,), generator=generator, dtype=torch.int32) if bias else None
    y = grid(0.017 * 0.006 * 80 * n_in**0.5, 128) if gridded else None
    program = one_op(Kind.LINEAR, LinearAttrs(), [(n_in,)], [x], (n_out,), y, w, scale, values)
    check(program, [on_grid(x, integers(8, 50, n_in))], "QGemm")


@pytest.mark.parametrize("channels", [3, 7, 64])
@pytest.mark.parametrize("size", [(1, 1), (3, 5), (7, 7), (8, 8), (32, 32)], ids=str)
def test_global_average_pool(size: tuple[int, int], channels: int) -> None:
    x, y = grid(0.043, 17), grid(0.0123, 201)
    program = one_op(Kind.AVERAGE_POOL, AveragePoolAttrs(), [(channels, *size)], [x], (channels, 1, 1), y)
    check(program, [on_grid(x, integers(9, 200, channels, *size))], "QLinearGlobalAveragePool")


@pytest.mark.parametrize("size", [(1, 2), (2, 2), (7, 7), (8, 8)], ids=str)
def test_global_average_pool_on_ties(size: tuple[int, int]) -> None:
    """Sums are divided by 2, 4, 6 or 2/3, up to some units in the last place: half to even, not away from zero."""
    generator = torch.Generator().manual_seed(15)
    for seed in range(8):
        z_x, z_y = torch.randint(0, 256, (2,), generator=generator).tolist()
        s_x = float(torch.rand((), generator=generator) * 0.1 + 0.001)
        s_y = s_x * (2, 4, 6, 2 / 3)[seed % 4] / (size[0] * size[1]) * (1 + (seed // 4) * 2.0**-23)
        x, y = grid(s_x, z_x), grid(s_y, z_y)
        program = one_op(Kind.AVERAGE_POOL, AveragePoolAttrs(), [(7, *size)], [x], (7, 1, 1), y)
        q = torch.randint(max(0, z_x - 9), min(256, z_x + 10), (200, 7, *size), generator=generator)
        check(program, [on_grid(x, q)], "QLinearGlobalAveragePool")


AVERAGE_POOLS = {
    "2x2": AveragePoolAttrs((2, 2), (2, 2), (0, 0)),
    "3x3 padded": AveragePoolAttrs((3, 3), (2, 2), (1, 1)),
    "3x3 padding left out": AveragePoolAttrs((3, 3), (2, 2), (1, 1), count_include_pad=False),
    "5x5 padding left out": AveragePoolAttrs((5, 5), (1, 1), (2, 2), count_include_pad=False),
}


@pytest.mark.parametrize("name", AVERAGE_POOLS)
def test_average_pool(name: str) -> None:
    a = AVERAGE_POOLS[name]
    assert a.kernel is not None
    x, y = grid(0.043, 17), grid(0.0311, 66)
    shape = F.avg_pool2d(torch.zeros(1, 8, 11, 9), a.kernel, a.stride, a.padding, False, a.count_include_pad).shape
    program = one_op(Kind.AVERAGE_POOL, a, [(8, 11, 9)], [x], tuple(shape[1:]), y)
    check(program, [on_grid(x, integers(10, 100, 8, 11, 9))], "QLinearAveragePool")


@pytest.mark.parametrize("name", AVERAGE_POOLS)
def test_average_pool_on_ties(name: str) -> None:
    a, generator = AVERAGE_POOLS[name], torch.Generator().manual_seed(16)
    assert a.kernel is not None
    shape = F.avg_pool2d(torch.zeros(1, 8, 11, 9), a.kernel, a.stride, a.padding, False, a.count_include_pad).shape
    for steps in (2.0, 4.0, a.kernel[0] * a.kernel[1], 8.0):
        z_x, z_y = torch.randint(0, 256, (2,), generator=generator).tolist()
        s_x = float(torch.rand((), generator=generator) * 0.1 + 0.001)
        x, y = grid(s_x, z_x), grid(s_x * steps / (a.kernel[0] * a.kernel[1]), z_y)
        program = one_op(Kind.AVERAGE_POOL, a, [(8, 11, 9)], [x], tuple(shape[1:]), y)
        q = torch.randint(max(0, z_x - 9), min(256, z_x + 10), (20, 8, 11, 9), generator=generator)
        check(program, [on_grid(x, q)], "QLinearAveragePool")


MOVES = {
    "max pool": (Kind.MAX_POOL, MaxPoolAttrs((3, 3), (2, 2), (1, 1), (1, 1)), (6, 5, 4), "MaxPool"),
    "max pool ceil": (Kind.MAX_POOL, MaxPoolAttrs((2, 2), (2, 2), (0, 0), (1, 1), True), (6, 5, 4), "MaxPool"),
    "view": (Kind.VIEW, ViewAttrs((-1, 6 * 9 * 7)), (6 * 9 * 7,), "Reshape"),
    "permute": (Kind.PERMUTE, PermuteAttrs((0, 2, 3, 1)), (9, 7, 6), "Transpose"),
    "pad": (Kind.PAD, PadAttrs(((0, 0), (2, 1), (0, 3), (1, 0))), (9, 12, 8), "Pad"),
    "slice": (Kind.SLICE, SliceAttrs(2, 1, None, 2), (6, 4, 7), "Slice"),
    "slice to": (Kind.SLICE, SliceAttrs(1, 0, 4, 1), (4, 9, 7), "Slice"),
}


@pytest.mark.parametrize("name", MOVES)
def test_what_only_moves_integers(name: str) -> None:
    kind, attrs, shape, fused = MOVES[name]
    x = grid(0.043, 17)
    program = one_op(kind, attrs, [(6, 9, 7)], [x], shape, x)
    check(program, [on_grid(x, integers(11, 8, 6, 9, 7))], fused)


@pytest.mark.parametrize("mode", ["constant", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("sides", [((2, 1),), ((0, 3), (1, 0)), ((1, 2), (0, 0), (3, 1))], ids=["1d", "2d", "3d"])
def test_padding_of_every_mode(sides: tuple[tuple[int, int], ...], mode: str) -> None:
    x, sizes = grid(0.043, 17), (5, 4, 6)[: len(sides)]
    out = tuple(size + before + after for size, (before, after) in zip(sizes, sides, strict=True))
    program = one_op(Kind.PAD, PadAttrs(((0, 0), (0, 0), *sides), mode), [(3, *sizes)], [x], (3, *out), x)
    fused = "QuantizeLinear" if mode == "circular" else "Pad"  # circular: a Concat for every dimension
    check(program, [on_grid(x, integers(14, 4, 3, *sizes))], fused)


@settings(max_examples=20, deadline=None)
@given(SCALES, ZEROS, st.integers(0, 10_000))
def test_quantize_of_arbitrary_floats(scale: float, zero_point: int, seed: int) -> None:
    x = grid(scale, zero_point)
    generator = torch.Generator().manual_seed(seed)
    reals = torch.randn(4, 500, generator=generator) * 200 * scale
    ties = (torch.arange(-300, 300).float() + 0.5) * scale  # exactly between two integers, or a bit off
    program = one_op(Kind.VIEW, ViewAttrs((-1, 1100)), [(1100,)], [x], (1100,), x)
    check(program, [torch.cat([reals, ties.repeat(4, 1)], 1)], "QuantizeLinear")
