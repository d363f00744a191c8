"""torch's INT8 kernels against the reference, op by op, integer by integer, for every engine. No tolerance.

Scales and inputs are drawn so that a large share of the results lies on a tie, up to a few units in the last place:
there, formulas that agree everywhere else differ. On random data a wrong one passes.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Generator, Tensor

from edgeqat.interpreter.arithmetic import ARITHMETICS
from edgeqat.interpreter.run import Interpreter
from edgeqat.lowering.to_torchscript import spell
from edgeqat.lowering.torchscript_session import TorchScriptSession
from edgeqat.op_attrs import (
    AddAttrs,
    Attrs,
    AveragePoolAttrs,
    ConvAttrs,
    LinearAttrs,
    MaxPoolAttrs,
    PadAttrs,
    PermuteAttrs,
    SliceAttrs,
    ViewAttrs,
)
from edgeqat.program import Grid, Kind, Op, QuantizedProgram
from edgeqat.replay.kernels import EXACT_ENGINES, arithmetic_here
from programs import grid, on_grid, one_op

ENGINES = [
    pytest.param(
        engine,
        marks=pytest.mark.skipif(
            arithmetic_here(f"torchscript/{engine}") != engine,
            reason=f"{engine} has a known arithmetic only on x86, all but qnnpack only with AVX512-VNNI",
        ),
    )
    for engine in EXACT_ENGINES
]


@pytest.fixture(params=ENGINES)
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
    outputs, inside = TorchScriptSession(path, engine, 1, spelling.taps).run_with_taps(inputs)
    expected, values = Interpreter(program, ARITHMETICS[engine]).run_with_taps(inputs)
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


def test_quantize(engine: str, draw: Generator, tmp_path: Path) -> None:
    for shape in ((10,), (3, 5, 5), (16, 9, 9), (33,)):
        scale, z = 2 ** uniform(draw, -8, 0), integer(draw, 0, 256)
        ties = torch.randint(-z, 256 - z, (8, *shape), generator=draw).double() + 0.5
        x = nudged((ties * torch.tensor(scale).double()).float(), draw)
        program = one_op(Kind.VIEW, ViewAttrs((-1, x[0].numel())), [shape], [g := grid(scale, z)], (x[0].numel(),), g)
        check(program, [x], engine, tmp_path)


CONVS = {
    "3x3": (16, 16, 1, 3),
    "odd channels": (5, 3, 1, 3),
    "1x1": (33, 16, 1, 1),
    "grouped": (16, 4, 4, 3),
    "two a group": (6, 2, 3, 3),
    "depthwise": (16, 1, 16, 3),
    "depthwise 5x5": (24, 1, 24, 5),
    "above 100 groups": (112, 1, 112, 3),
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


@pytest.mark.parametrize("per_channel", [True, False], ids=["per-channel", "per-tensor"])
@pytest.mark.parametrize("name", CONVS)
def test_conv1d_on_ties(engine: str, name: str, per_channel: bool, draw: Generator, tmp_path: Path) -> None:
    out, per_group, groups, kernel = CONVS[name]
    for stride, dilation, pads, bias_range in (
        (1, 1, (kernel // 2, kernel // 2), None),
        (2, 1, (0, 0), 200),
        (1, 2, (1, 2), 10**5),
        (3, 1, (kernel // 2, 0), 200),
    ):
        attrs = ConvAttrs((stride,), (pads,), (dilation,), groups)
        length = (29 + sum(pads) - dilation * (kernel - 1) - 1) // stride + 1
        weight = torch.randint(-20, 21, (out, per_group, kernel), generator=draw)
        for factor in (2.0, 8.0, 32 / 3):
            z = integer(draw, 0, 256)
            x_grid, w_scale, y = _scales(draw, z, out if per_channel else None, factor)
            bias = None if bias_range is None else torch.randint(-bias_range, bias_range, (out,), generator=draw).int()
            shape = (per_group * groups, 29)
            program = one_op(Kind.CONV, attrs, [shape], [x_grid], (out, length), y, weight, w_scale, bias)
            check(program, [on_grid(x_grid, near_zero(z, draw, 4, *shape))], engine, tmp_path)


def _scales(draw: Generator, z: int, out: int | None, factor: float) -> tuple[Grid, Tensor, Grid]:
    """Input grid, weight scale and an output grid in which one channel's accumulators are multiples of 1 / factor."""
    scale = torch.tensor(2 ** uniform(draw, -8, 0))
    w_scale = (2 ** (torch.randn(() if out is None else (out,), generator=draw) - 6)).float()
    product = (scale * w_scale).flatten()
    sharp = product[integer(draw, 0, len(product))]
    return (
        grid(float(scale), z),
        w_scale,
        grid(float(nudged(sharp * factor, draw)), integer(draw, 0, 256)),
    )


@pytest.mark.parametrize("name", CONVS)
def test_conv_with_the_largest_weights_and_inputs(engine: str, name: str, draw: Generator, tmp_path: Path) -> None:
    out, per_group, groups, kernel = CONVS[name]
    limit = 63 if per_group == 1 and engine in ("fbgemm", "x86") else 127
    pad = kernel // 2
    attrs = ConvAttrs((2, 2), ((pad, pad), (pad, pad)), (1, 1), groups)
    weight = torch.full((out, per_group, kernel, kernel), limit) * torch.randint(0, 2, (out, 1, 1, 1), generator=draw)
    weight = weight * 2 - limit
    shape = (per_group * groups, 9, 9)
    x = torch.where(torch.rand(2, *shape, generator=draw) < 0.8, 255, 0)
    y = grid(per_group * kernel * kernel * limit * 255 / 100, 128)
    program = one_op(Kind.CONV, attrs, [shape], [grid(1.0, 0)], (out, 5, 5), y, weight, torch.ones(out))
    check(program, [x.float()], engine, tmp_path)


@pytest.mark.parametrize("per_channel", [True, False], ids=["per-channel", "per-tensor"])
@pytest.mark.parametrize("sizes", [(10, 64), (7, 33), (64, 128), (1, 16)], ids=str)
def test_linear_on_ties(
    engine: str, sizes: tuple[int, int], per_channel: bool, draw: Generator, tmp_path: Path
) -> None:
    out, inside = sizes
    for factor in (2.0, 8.0, 32 / 3):
        z = integer(draw, 0, 256)
        x_grid, w_scale, y = _scales(draw, z, out if per_channel else None, factor)
        weight = torch.randint(-20, 21, (out, inside), generator=draw)
        bias = torch.randint(-200, 200, (out,), generator=draw).int()
        program = one_op(Kind.LINEAR, LinearAttrs(), [(inside,)], [x_grid], (out,), y, weight, w_scale, bias)
        check(program, [on_grid(x_grid, near_zero(z, draw, 64, inside))], engine, tmp_path)


@pytest.mark.parametrize("shape", [(10,), (64,), (75,), (16, 9, 9), (3, 5, 5), (64, 7, 7)], ids=str)
def test_add_on_ties(engine: str, shape: tuple[int, ...], draw: Generator, tmp_path: Path) -> None:
    for batch in (1, 3):
        for step in range(12):
            scale = torch.tensor(2 ** uniform(draw, -8, 0))
            other = [scale, nudged(scale * 2, draw), nudged(scale * 1.5, draw), scale * 2 ** uniform(draw, -2, 2)][
                step % 4
            ]
            y = nudged(scale * [2.0, 4.0, 1.0, 3.0][step % 4 if step < 8 else 0], draw)
            grids = [grid(float(s), integer(draw, 0, 256)) for s in (scale, other, y)]
            inputs = [on_grid(g, torch.randint(0, 256, (batch, *shape), generator=draw)) for g in grids[:2]]
            program = one_op(Kind.ADD, AddAttrs(), [shape, shape], grids[:2], shape, grids[2])
            check(program, inputs, engine, tmp_path)


def test_add_on_all_pairs_of_integers(engine: str, draw: Generator, tmp_path: Path) -> None:
    left, right = torch.arange(256).repeat_interleave(256)[None], torch.arange(256).repeat(256)[None]
    for _ in range(6):
        grids = [grid(2 ** uniform(draw, -8, 0), integer(draw, 0, 256)) for _ in range(3)]
        program = one_op(Kind.ADD, AddAttrs(), [(65536,), (65536,)], grids[:2], (65536,), grids[2])
        check(program, [on_grid(grids[0], left), on_grid(grids[1], right)], engine, tmp_path)


IDENTITY = torch.eye(5, dtype=torch.int8).reshape(5, 5, 1)
REORDERING: dict[str, tuple[Kind, Attrs, tuple[int, int]]] = {
    "conv1d": (Kind.CONV, ConvAttrs((1,), ((0, 0),), (1,), 1), (5, 11)),
    "permute": (Kind.PERMUTE, PermuteAttrs((0, 2, 1)), (11, 5)),
}


@pytest.mark.parametrize("name", REORDERING)
def test_add_behind_what_reorders_memory_in_three_dimensions(
    engine: str, name: str, draw: Generator, tmp_path: Path
) -> None:
    """The last 37 of 165 sums follow another formula: which ones these are is a matter of the order in memory."""
    kind, attrs, out = REORDERING[name]
    for step in range(12):
        scale = torch.tensor(2 ** uniform(draw, -8, 0))
        grids = [grid(float(s), integer(draw, 0, 256)) for s in (scale, nudged(scale * 2, draw))]
        y = grid(float(nudged(scale * [2.0, 4.0, 1.0][step % 3], draw)), integer(draw, 0, 256))
        before = one_op(Kind.ADD, AddAttrs(), [out, out], grids, out, y, IDENTITY, torch.ones(5))
        *quantize, add, dequantize = before.ops
        weight = "w" if kind is Kind.CONV else None
        moves = [Op(kind, (op.name,), (f"{op.name}.m",), attrs, weight=weight) for op in quantize]
        add = replace(add, inputs=tuple(op.name for op in moves), weight=None)
        values = {
            v.name: replace(v, shape=("batch", 5, 11)) if v.name[0] == "x" else v for v in before.values.values()
        }
        values |= {op.name: replace(before.values[op.inputs[0]], name=op.name, shape=("batch", *out)) for op in moves}
        program = replace(before, ops=(*quantize, *moves, add, dequantize), values=values)
        inputs = [on_grid(g, torch.randint(0, 256, (3, 5, 11), generator=draw)) for g in grids]
        check(program, inputs, engine, tmp_path)


WINDOWS = [
    AveragePoolAttrs(),
    AveragePoolAttrs((2, 2), (2, 2), (0, 0)),
    AveragePoolAttrs((2, 3), (1, 1), (0, 0)),
    AveragePoolAttrs((3, 3), (2, 2), (1, 1)),
    AveragePoolAttrs((6, 6), (3, 3), (2, 2)),
]


@pytest.mark.parametrize("plane", [(7, 6), (2, 3), (10, 1), (3, 6), (14, 14)])
def test_global_average_pool_on_ties(engine: str, plane: tuple[int, int], draw: Generator, tmp_path: Path) -> None:
    """A sum that is half a step over a multiple of n; 1 / n is no float, so how it is rounded decides."""
    n = plane[0] * plane[1]
    for zero_point in (0, 9, 158, 200, 255):
        g = grid(2 ** uniform(draw, -8, 0), zero_point)
        q = torch.randint(0, 256, (64, 24, n), generator=draw)
        missing = (n // 2 - (q - zero_point).sum(-1)) % n  # which spread over the elements leaves half a step
        q[..., : n - 1] += (torch.arange(n - 1) < missing[..., None]).long()
        q = q.clamp(0, 255).reshape(64, 24, *plane)
        program = one_op(Kind.AVERAGE_POOL, AveragePoolAttrs(), [(24, *plane)], [g], (24, 1, 1), g)
        check(program, [on_grid(g, q)], engine, tmp_path)


@pytest.mark.parametrize("channels", [5, 16, 40, 70])
@pytest.mark.parametrize("attrs", WINDOWS, ids=lambda a: str(a.kernel))
def test_average_pool(engine: str, attrs: AveragePoolAttrs, channels: int, draw: Generator, tmp_path: Path) -> None:
    for size in (8, 14):
        g = grid(2 ** uniform(draw, -8, 0), integer(draw, 0, 256))
        q = torch.randint(0, 256, (3, channels, size, size), generator=draw)
        sizes = (
            tuple(torch.nn.functional.avg_pool2d(q.float(), attrs.kernel, attrs.stride, attrs.padding).shape[1:])
            if attrs.kernel
            else (channels, 1, 1)
        )
        program = one_op(Kind.AVERAGE_POOL, attrs, [(channels, size, size)], [g], sizes, g)
        check(program, [on_grid(g, q)], engine, tmp_path)


def test_average_pool_that_leaves_the_padding_out(engine: str, draw: Generator, tmp_path: Path) -> None:
    if engine == "qnnpack":
        pytest.skip("qnnpack counts the padding; its target leaves such pools in float")
    attrs = AveragePoolAttrs((3, 4), (2, 2), (1, 1), count_include_pad=False)
    g = grid(0.1, 37)
    q = torch.randint(0, 256, (3, 40, 14, 14), generator=draw)
    program = one_op(Kind.AVERAGE_POOL, attrs, [(40, 14, 14)], [g], (40, 7, 7), g)
    check(program, [on_grid(g, q)], engine, tmp_path)


MOVES: dict[str, tuple[Kind, Attrs, tuple[int, ...]]] = {
    "max pool": (Kind.MAX_POOL, MaxPoolAttrs((3, 3), (2, 2), (1, 1), (1, 1)), (6, 4, 4)),
    "view": (Kind.VIEW, ViewAttrs((-1, 6 * 64)), (6 * 64,)),
    "permute": (Kind.PERMUTE, PermuteAttrs((0, 2, 3, 1)), (8, 8, 6)),
    "pad": (Kind.PAD, PadAttrs(((0, 0), (2, 1), (0, 3), (1, 0))), (9, 11, 9)),
    "slice": (Kind.SLICE, SliceAttrs(3, 1, None, 2), (6, 8, 4)),
}


@pytest.mark.parametrize("name", MOVES)
def test_what_moves_integers(engine: str, name: str, draw: Generator, tmp_path: Path) -> None:
    kind, attrs, sizes = MOVES[name]
    g = grid(0.05, 31)
    program = one_op(kind, attrs, [(6, 8, 8)], [g], sizes, g)
    check(program, [on_grid(g, torch.randint(0, 256, (3, 6, 8, 8), generator=draw))], engine, tmp_path)


@pytest.mark.parametrize("mode", ["constant", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("sides", [((2, 1),), ((0, 3), (1, 0)), ((1, 2), (0, 0), (3, 1))], ids=["1d", "2d", "3d"])
def test_padding_of_every_mode(
    engine: str, sides: tuple[tuple[int, int], ...], mode: str, draw: Generator, tmp_path: Path
) -> None:
    g, sizes = grid(0.05, 31), (5, 4, 6)[: len(sides)]
    out = tuple(size + before + after for size, (before, after) in zip(sizes, sides, strict=True))
    program = one_op(Kind.PAD, PadAttrs(((0, 0), (0, 0), *sides), mode), [(3, *sizes)], [g], (3, *out), g)
    check(program, [on_grid(g, torch.randint(0, 256, (4, 3, *sizes), generator=draw))], engine, tmp_path)


def test_uneven_padding_stride_and_dilation(engine: str, draw: Generator, tmp_path: Path) -> None:
    attrs = ConvAttrs((2, 1), ((0, 1), (2, 1)), (1, 2), 1)
    weight, x_grid = torch.randint(-127, 128, (8, 4, 2, 3), generator=draw), grid(0.05, 90)
    program = one_op(
        Kind.CONV, attrs, [(4, 8, 8)], [x_grid], (8, 4, 7), grid(2.0, 120), weight, torch.full((8,), 0.01)
    )
    check(program, [on_grid(x_grid, torch.randint(0, 256, (3, 4, 8, 8), generator=draw))], engine, tmp_path)


def test_a_large_bias_is_rounded_as_the_kernel_does(engine: str, draw: Generator, tmp_path: Path) -> None:
    """Above 2**22 a float32 bias no longer stands for one integer alone."""
    bias = torch.randint(2**22, 2**28, (64,), generator=draw).int()
    x_grid, w_scale = grid(0.013, 3), (torch.rand(64, generator=draw) * 1e-6 + 1e-7)
    y = grid(float((bias * w_scale * 0.013).max()) / 250, 0)
    weight = torch.randint(-127, 128, (64, 16), generator=draw)
    program = one_op(Kind.LINEAR, LinearAttrs(), [(16,)], [x_grid], (64,), y, weight, w_scale, bias)
    check(program, [on_grid(x_grid, torch.randint(0, 256, (64, 16), generator=draw))], engine, tmp_path)
