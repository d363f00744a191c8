"""LiteRT's INT8 kernels against the reference, op by op, integer by integer, on both engines. No tolerance.

Scales and inputs are drawn so that a large share of the results lies on a tie: there, formulas that agree everywhere
else differ. The builtin kernels compute what fills no vector in another way, so sizes are of all kinds.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Generator, Tensor

from edgeqat.interpreter.arithmetic import ARITHMETICS
from edgeqat.interpreter.run import Interpreter
from edgeqat.lowering.litert_session import LiteRTSession
from edgeqat.lowering.to_litert import spell
from edgeqat.op_attrs import (
    AddAttrs,
    AveragePoolAttrs,
    ConcatAttrs,
    ConvAttrs,
    LinearAttrs,
    MulAttrs,
    ViewAttrs,
)
from edgeqat.program import Grid, Kind, QuantizedProgram
from edgeqat.replay.kernels import ENGINES, arithmetic_here
from programs import grid, on_grid, one_op

ENGINE_PARAMS = [
    pytest.param(
        engine,
        marks=pytest.mark.skipif(
            arithmetic_here(f"litert/{engine}") is None, reason=f"litert/{engine} has no known arithmetic here"
        ),
    )
    for engine in ENGINES["litert"]
]


@pytest.fixture(params=ENGINE_PARAMS)
def engine(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def draw() -> Generator:
    return Generator().manual_seed(7)


def check(program: QuantizedProgram, inputs: list[Tensor], engine: str, folder: Path) -> None:
    """Asserts that every value of the runtime is the reference's."""
    spelling = spell(program, engine)
    path = folder / spelling.file_name
    path.write_bytes(spelling.data)
    outputs, inside = LiteRTSession(path, engine, 1, spelling.taps).run_with_taps(inputs)
    expected, values = Interpreter(program, ARITHMETICS[f"litert/{engine}"]).run_with_taps(inputs)
    assert set(inside) == set(values)
    for name, integers in values.items():
        wrong = int((inside[name] != integers).sum())
        assert wrong == 0, f"{name}: {wrong} of {integers.numel()} differ"
    assert torch.equal(outputs[0], expected)


def uniform(draw: Generator, low: float, high: float) -> float:
    return float(torch.rand((), generator=draw)) * (high - low) + low


def integer(draw: Generator, low: int, high: int) -> int:
    return int(torch.randint(low, high, (), generator=draw))


def nudged(x: Tensor, draw: Generator) -> Tensor:
    """Moved by up to three units in the last place."""
    steps = torch.randint(-3, 4, x.shape, generator=draw)
    return (x.double() * (1 + steps.double() * 2.0**-23)).float()


def near_zero(z: int, draw: Generator, *shape: int) -> Tensor:
    """Integers within 20 of the zero point: small accumulators, so that ties are frequent."""
    return torch.randint(max(0, z - 20), min(256, z + 21), shape, generator=draw)


def drawn(draw: Generator) -> Grid:
    return grid(2 ** uniform(draw, -8, 0), integer(draw, 0, 256))


def anything(draw: Generator, *shape: int) -> Tensor:
    return torch.randint(0, 256, shape, generator=draw)


def test_quantize(engine: str, draw: Generator, tmp_path: Path) -> None:
    for shape in ((10,), (3, 5, 5), (16, 9, 9), (33,)):
        scale, z = 2 ** uniform(draw, -8, 0), integer(draw, 0, 256)
        ties = torch.randint(-z, 256 - z, (8, *shape), generator=draw).double() + 0.5
        x = nudged((ties * torch.tensor(scale).double()).float(), draw)
        program = one_op(Kind.VIEW, ViewAttrs((-1, x[0].numel())), [shape], [g := grid(scale, z)], (x[0].numel(),), g)
        check(program, [x], engine, tmp_path)


def test_dequantize_in_blocks_and_at_the_end(engine: str, draw: Generator, tmp_path: Path) -> None:
    for n in (1, 7, 8, 15, 31, 40, 100):
        for batch in (1, 3):
            g = drawn(draw)
            program = one_op(Kind.VIEW, ViewAttrs((-1, n)), [(n,)], [g], (n,), g)
            check(program, [on_grid(g, anything(draw, batch, n))], engine, tmp_path)


CONVS = {
    "3x3": (16, 16, 1, 3),
    "odd channels": (5, 3, 1, 3),
    "1x1": (33, 16, 1, 1),
    "grouped": (16, 4, 4, 3),
    "two a group": (6, 2, 3, 3),
    "two of one": (12, 1, 6, 3),
    "depthwise": (16, 1, 16, 3),
    "depthwise, some left over": (21, 1, 21, 3),
    "depthwise, less than a block": (5, 1, 5, 5),
}


@pytest.mark.parametrize("per_channel", [True, False], ids=["per-channel", "per-tensor"])
@pytest.mark.parametrize("name", CONVS)
def test_conv_on_ties(engine: str, name: str, per_channel: bool, draw: Generator, tmp_path: Path) -> None:
    out, per_group, groups, kernel = CONVS[name]
    pad = kernel // 2
    attrs = ConvAttrs((1, 1), ((pad, pad), (pad, pad)), (1, 1), groups)
    for bias_range in (None, 200, 10**5):
        weight = torch.randint(-20, 21, (out, per_group, kernel, kernel), generator=draw)
        for factor in (2.0, 8.0, 32 / 3):
            z = integer(draw, 0, 256)
            x_grid, w_scale, y = _scales(draw, z, out if per_channel else None, factor)
            bias = None if bias_range is None else torch.randint(-bias_range, bias_range, (out,), generator=draw).int()
            shape = (per_group * groups, 7, 7)
            program = one_op(Kind.CONV, attrs, [shape], [x_grid], (out, 7, 7), y, weight, w_scale, bias)
            check(program, [on_grid(x_grid, near_zero(z, draw, 4, *shape))], engine, tmp_path)


def _scales(draw: Generator, z: int, out: int | None, factor: float) -> tuple[Grid, Tensor, Grid]:
    """Input grid, weight scale and an output grid in which one channel's accumulators are multiples of 1 / factor."""
    scale = torch.tensor(2 ** uniform(draw, -8, 0))
    w_scale = (2 ** (torch.randn(() if out is None else (out,), generator=draw) - 6)).float()
    product = (scale * w_scale).flatten()
    sharp = product[integer(draw, 0, len(product))]
    return grid(float(scale), z), w_scale, grid(float(nudged(sharp * factor, draw)), integer(draw, 0, 256))


@pytest.mark.parametrize("name", ["odd channels", "two a group", "depthwise, some left over"])
def test_conv_of_every_geometry(engine: str, name: str, draw: Generator, tmp_path: Path) -> None:
    out, per_group, groups, kernel = CONVS[name]
    for stride in ((1, 1), (2, 2), (2, 1)):
        for padding in (((0, 0), (0, 0)), ((1, 1), (1, 1)), ((0, 1), (2, 1))):
            for dilation in ((1, 1), (1, 2)):
                sizes = [
                    (9 + sum(sides) - gap * (kernel - 1) - 1) // step + 1
                    for sides, gap, step in zip(padding, dilation, stride, strict=True)
                ]
                attrs = ConvAttrs(stride, padding, dilation, groups)
                x_grid, w_scale, y = _scales(draw, 90, out, 8.0)
                weight = torch.randint(-127, 128, (out, per_group, kernel, kernel), generator=draw)
                shape = (per_group * groups, 9, 9)
                program = one_op(Kind.CONV, attrs, [shape], [x_grid], (out, *sizes), y, weight, w_scale)
                check(program, [on_grid(x_grid, near_zero(90, draw, 3, *shape))], engine, tmp_path)


@pytest.mark.parametrize("name", ["3x3", "odd channels", "1x1", "two a group", "depthwise"])
def test_conv1d_on_ties(engine: str, name: str, draw: Generator, tmp_path: Path) -> None:
    out, per_group, groups, kernel = CONVS[name]
    for stride, dilation, pads in ((1, 1, (1, 1)), (2, 1, (0, 0)), (1, 2, (1, 2)), (3, 1, (1, 0))):
        attrs = ConvAttrs((stride,), (pads,), (dilation,), groups)
        length = (29 + sum(pads) - dilation * (kernel - 1) - 1) // stride + 1
        weight, z = torch.randint(-20, 21, (out, per_group, kernel), generator=draw), integer(draw, 0, 256)
        x_grid, w_scale, y = _scales(draw, z, out, 8.0)
        shape = (per_group * groups, 29)
        program = one_op(Kind.CONV, attrs, [shape], [x_grid], (out, length), y, weight, w_scale)
        check(program, [on_grid(x_grid, near_zero(z, draw, 4, *shape))], engine, tmp_path)


@pytest.mark.parametrize("rows", [(), (5,)], ids=["features", "tokens"])
@pytest.mark.parametrize("per_channel", [True, False], ids=["per-channel", "per-tensor"])
@pytest.mark.parametrize("sizes", [(10, 64), (7, 33), (64, 128), (1, 16)], ids=str)
def test_linear_on_ties(
    engine: str, sizes: tuple[int, int], per_channel: bool, rows: tuple[int, ...], draw: Generator, tmp_path: Path
) -> None:
    out, inside = sizes
    for factor in (2.0, 8.0, 32 / 3):
        z = integer(draw, 0, 256)
        x_grid, w_scale, y = _scales(draw, z, out if per_channel else None, factor)
        weight = torch.randint(-20, 21, (out, inside), generator=draw)
        bias = torch.randint(-200, 200, (out,), generator=draw).int()
        shape, result = (*rows, inside), (*rows, out)
        program = one_op(Kind.LINEAR, LinearAttrs(), [shape], [x_grid], result, y, weight, w_scale, bias)
        check(program, [on_grid(x_grid, near_zero(z, draw, 16, *shape))], engine, tmp_path)


@pytest.mark.parametrize("shape", [(10,), (64,), (75,), (16, 9, 9), (3, 5, 5)], ids=str)
def test_add_on_ties(engine: str, shape: tuple[int, ...], draw: Generator, tmp_path: Path) -> None:
    for batch in (1, 3):
        for step in range(12):
            scale = torch.tensor(2 ** uniform(draw, -8, 0))
            others = [scale, nudged(scale * 2, draw), nudged(scale * 1.5, draw), scale * 2 ** uniform(draw, -2, 2)]
            y = nudged(scale * [2.0, 4.0, 1.0, 3.0][step % 4 if step < 8 else 0], draw)
            grids = [grid(float(s), integer(draw, 0, 256)) for s in (scale, others[step % 4], y)]
            inputs = [on_grid(g, anything(draw, batch, *shape)) for g in grids[:2]]
            program = one_op(Kind.ADD, AddAttrs(), [shape, shape], grids[:2], shape, grids[2])
            check(program, inputs, engine, tmp_path)


def test_add_on_all_pairs_of_integers(engine: str, draw: Generator, tmp_path: Path) -> None:
    left, right = torch.arange(256).repeat_interleave(256)[None], torch.arange(256).repeat(256)[None]
    for _ in range(6):
        grids = [drawn(draw) for _ in range(3)]
        program = one_op(Kind.ADD, AddAttrs(), [(65536,), (65536,)], grids[:2], (65536,), grids[2])
        check(program, [on_grid(grids[0], left), on_grid(grids[1], right)], engine, tmp_path)


def test_add_and_mul_beyond_what_the_delegate_takes(engine: str, draw: Generator, tmp_path: Path) -> None:
    shape, y = (4096,), grid(0.01, 120)
    for exponent in (-17, -12, -10.01, -10, -9.99, 6):
        grids = [grid(0.01 * 2.0**exponent, 100), grid(0.011, 90)]
        inputs = [on_grid(g, anything(draw, 2, *shape)) for g in grids]
        check(one_op(Kind.ADD, AddAttrs(), [shape, shape], grids, shape, y), inputs, engine, tmp_path)
    for exponent in (-22, -17, -16.01, -15.99, -8):
        grids = [grid(0.01, 100), grid(2.0**exponent, 90)]
        inputs = [on_grid(g, anything(draw, 2, *shape)) for g in grids]
        check(one_op(Kind.MUL, MulAttrs(), [shape, shape], grids, shape, y), inputs, engine, tmp_path)


@pytest.mark.parametrize("smaller", [(6, 1, 1), (1, 9, 8), (1, 1, 1), (6, 1, 8)], ids=str)
@pytest.mark.parametrize("kind", [Kind.ADD, Kind.MUL], ids=lambda kind: kind.value)
def test_operands_of_different_shapes(
    engine: str, kind: Kind, smaller: tuple[int, ...], draw: Generator, tmp_path: Path
) -> None:
    if kind is Kind.ADD and engine == "builtin":
        pytest.skip("its targets leave such sums in float")
    for swapped in (False, True):
        a, b = drawn(draw), drawn(draw)
        product = float(a.filled()[0] * b.filled()[0] * 100)
        y = grid(product if kind is Kind.MUL else float(nudged(a.filled()[0] * 2, draw)), integer(draw, 0, 256))
        sides = [((6, 9, 8), a), (smaller, b)]
        (s0, g0), (s1, g1) = reversed(sides) if swapped else sides
        inputs = [on_grid(g, anything(draw, 3, *s)) for s, g in ((s0, g0), (s1, g1))]
        attrs = AddAttrs() if kind is Kind.ADD else MulAttrs()
        check(one_op(kind, attrs, [s0, s1], [g0, g1], (6, 9, 8), y), inputs, engine, tmp_path)


@pytest.mark.parametrize("shape", [(65536,), (13, 5, 3), (16, 8, 8)], ids=str)
def test_mul(shape: tuple[int, ...], engine: str, draw: Generator, tmp_path: Path) -> None:
    for _ in range(12):
        a, b = drawn(draw), drawn(draw)
        # A multiplier of a half, moved by some units in the last place, puts every other product on a tie.
        s_y = float(nudged(a.filled()[0] * b.filled()[0] * 2.0 * integer(draw, 1, 200), draw))
        inputs = [on_grid(g, anything(draw, 2, *shape)) for g in (a, b)]
        program = one_op(Kind.MUL, MulAttrs(), [shape, shape], [a, b], shape, grid(s_y, integer(draw, 0, 256)))
        check(program, inputs, engine, tmp_path)


@pytest.mark.parametrize("rest", [(), (5, 5), (5,)], ids=["features", "images", "sequences"])
def test_concat(rest: tuple[int, ...], engine: str, draw: Generator, tmp_path: Path) -> None:
    for _ in range(8):
        a, b = drawn(draw), drawn(draw)
        # A scale of twice an input's, moved by some units in the last place, puts every other integer on a tie.
        s_y = float(nudged(a.filled()[0] * 2.0, draw)) if integer(draw, 0, 2) else float(b.filled()[0]) * 1.3
        y = grid(s_y, integer(draw, 0, 256))
        shapes = [(n, *rest) for n in (63, 19, 7)]
        inputs = [on_grid(g, anything(draw, 2, *shape)) for g, shape in zip((a, b, y), shapes, strict=True)]
        program = one_op(Kind.CONCAT, ConcatAttrs(1), shapes, [a, b, y], (89, *rest), y)
        check(program, inputs, engine, tmp_path)


WINDOWS = [
    AveragePoolAttrs((2, 2), (2, 2), (0, 0)),
    AveragePoolAttrs((2, 3), (1, 1), (0, 0)),
    AveragePoolAttrs((3, 3), (2, 2), (1, 1)),
    AveragePoolAttrs((6, 6), (3, 3), (2, 2)),
]


@pytest.mark.parametrize("channels", [5, 16, 40])
@pytest.mark.parametrize("attrs", WINDOWS, ids=lambda a: str(a.kernel))
def test_average_pool(engine: str, attrs: AveragePoolAttrs, channels: int, draw: Generator, tmp_path: Path) -> None:
    assert attrs.kernel is not None
    for size in (8, 14):
        g, q = drawn(draw), anything(draw, 3, channels, size, size)
        sizes = tuple(torch.nn.functional.avg_pool2d(q.float(), attrs.kernel, attrs.stride, attrs.padding).shape[1:])
        program = one_op(Kind.AVERAGE_POOL, attrs, [(channels, size, size)], [g], sizes, g)
        check(program, [on_grid(g, q)], engine, tmp_path)


@pytest.mark.parametrize("size", [(8, 8), (6, 5), (7, 7), (14, 14), (2, 2), (3, 10)], ids=str)
def test_global_average_pool(engine: str, size: tuple[int, int], draw: Generator, tmp_path: Path) -> None:
    for channels in (5, 16, 40, 300):
        g, q = drawn(draw), anything(draw, 6, channels, *size)
        program = one_op(Kind.AVERAGE_POOL, AveragePoolAttrs(), [(channels, *size)], [g], (channels, 1, 1), g)
        check(program, [on_grid(g, q)], engine, tmp_path)
