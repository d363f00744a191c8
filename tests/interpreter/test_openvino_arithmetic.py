"""OpenVINO's INT8 kernels against the reference, op by op, integer by integer. No tolerance.

As for torch's, scales and inputs are drawn so that a large share of the results lies on a tie, up to a few units in
the last place.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Generator, Tensor

from edgeqat.interpreter.arithmetic import ARITHMETICS
from edgeqat.interpreter.run import Interpreter
from edgeqat.interpreter.sum_forms import sum_forms
from edgeqat.lookup import FUNCTIONS, fixed_grid, table_of
from edgeqat.lowering.openvino_session import OpenVinoSession
from edgeqat.lowering.to_openvino import spell
from edgeqat.op_attrs import (
    AddAttrs,
    Attrs,
    AveragePoolAttrs,
    ClampAttrs,
    ConvAttrs,
    LinearAttrs,
    LookupAttrs,
    MaxPoolAttrs,
    PadAttrs,
    PermuteAttrs,
    ResizeAttrs,
    SliceAttrs,
    ViewAttrs,
)
from edgeqat.program import Const, Grid, Kind, Op, QuantizedProgram, Value
from edgeqat.replay.kernels import arithmetic_here
from interpreter.test_torchscript_arithmetic import integer, nudged, uniform
from programs import CONV, TABLE_ARGUMENTS, grid, on_grid, one_op

pytestmark = pytest.mark.skipif(
    arithmetic_here("openvino") is None, reason="OpenVINO's kernels are known on x86 with AVX512-VNNI, without AMX"
)

ZEROS = (0, 0, 37, 200)
"""Zero points of results; 0 is that of a ReLU, whose quantization has a formula of its own."""


@pytest.fixture
def draw() -> Generator:
    return Generator().manual_seed(11)


def check(program: QuantizedProgram, inputs: list[Tensor], folder: Path) -> None:
    """Asserts that every value that can be looked at, and the output, is the reference's."""
    spelling = spell(program, None)
    path = folder / spelling.file_name
    path.write_bytes(spelling.data)
    outputs, inside = OpenVinoSession(path, "CPU", 1, spelling.taps).run_with_taps(inputs)
    expected, values = Interpreter(program, ARITHMETICS["openvino/x86"]).run_with_taps(inputs)
    assert inside and set(values) - set(inside) <= spelling.unseen
    for name, integers in inside.items():
        wrong = int((integers != values[name]).sum())
        assert wrong == 0, f"{name}: {wrong} of {integers.numel()} differ"
    assert torch.equal(outputs[0], expected)


def drawn(draw: Generator, zero_point: int | None = None) -> Grid:
    return grid(2 ** uniform(draw, -8, -2), integer(draw, 0, 256) if zero_point is None else zero_point)


def test_quantize(draw: Generator, tmp_path: Path) -> None:
    for zero_point in (0, 100, 255):
        x = drawn(draw, zero_point)
        steps = torch.randint(-20, 276, (2, 3, 32, 32), generator=draw) - zero_point + 0.5
        program = one_op(Kind.VIEW, ViewAttrs((-1, 3072)), [(3, 32, 32)], [x], (3072,), x)
        check(program, [nudged(steps * x.filled()[0], draw)], tmp_path)


@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("groups", [1, 4, 16])
def test_conv(groups: int, biased: bool, draw: Generator, tmp_path: Path) -> None:
    for i, zero_point in enumerate(ZEROS):
        x, base = drawn(draw, (0, 13)[i % 2]), torch.tensor(uniform(draw, 0.001, 0.01))
        scales = nudged(base.repeat(16), draw)
        y = grid(float(nudged(x.filled()[0] * base * 32 * integer(draw, 3, 40), draw)), zero_point)
        weight = torch.randint(-127, 128, (16, 1, 3, 3), generator=draw)
        bias = torch.randint(-2000, 2000, (16,), generator=draw).int() if biased else None
        shape, attrs = (groups, 16, 16), replace(CONV, groups=groups)
        program = one_op(Kind.CONV, attrs, [shape], [x], (16, 16, 16), y, weight, scales, bias)
        check(program, [on_grid(x, torch.randint(0, 256, (4, *shape), generator=draw))], tmp_path)


@pytest.mark.parametrize("dims", [1, 3])
def test_conv_of_other_dimensions(dims: int, draw: Generator, tmp_path: Path) -> None:
    for zero_point in ZEROS[1:]:
        x, base = drawn(draw, 9), torch.tensor(uniform(draw, 0.001, 0.01))
        y = grid(float(nudged(x.filled()[0] * base * 32 * integer(draw, 3, 40), draw)), zero_point)
        weight = torch.randint(-127, 128, (8, 1, *[3] * dims), generator=draw)
        bias, attrs = torch.arange(8, dtype=torch.int32) * 99, ConvAttrs((1,) * dims, ((0, 2),) * dims, (1,) * dims, 1)
        shape = (1, *[9] * dims)
        program = one_op(
            Kind.CONV, attrs, [shape], [x], (8, *[9] * dims), y, weight, nudged(base.repeat(8), draw), bias
        )
        check(program, [on_grid(x, torch.randint(0, 256, (4, *shape), generator=draw))], tmp_path)


def test_linear(draw: Generator, tmp_path: Path) -> None:
    for zero_point in ZEROS:
        x, base = drawn(draw, (0, 13)[zero_point > 0]), torch.tensor(uniform(draw, 0.001, 0.01))
        y = grid(float(nudged(x.filled()[0] * base * 32 * integer(draw, 3, 40), draw)), zero_point)
        weight = torch.zeros(600, 16, dtype=torch.int64)
        weight[:, :3] = torch.randint(-127, 128, (600, 3), generator=draw)
        bias = torch.randint(-2000, 2000, (600,), generator=draw).int()
        program = one_op(
            Kind.LINEAR, LinearAttrs(), [(16,)], [x], (600,), y, weight, nudged(base.repeat(600), draw), bias
        )
        check(program, [on_grid(x, torch.randint(0, 256, (40, 16), generator=draw))], tmp_path)


@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no bias"])
def test_float_logits(biased: bool, draw: Generator, tmp_path: Path) -> None:
    x, weight = drawn(draw), torch.randint(-127, 128, (40, 64), generator=draw)
    bias = torch.randint(-20000, 20000, (40,), generator=draw).int() if biased else None
    scales = torch.rand(40, generator=draw) * 0.01
    program = one_op(Kind.LINEAR, LinearAttrs(), [(64,)], [x], (40,), None, weight, scales, bias)
    check(program, [on_grid(x, torch.randint(0, 256, (50, 64), generator=draw))], tmp_path)


@pytest.mark.parametrize(
    ("attrs", "size"),
    [
        (AveragePoolAttrs(None, (1, 1), (0, 0), True), 1),
        (AveragePoolAttrs((2, 2), (2, 2), (0, 0), True), 4),
        (AveragePoolAttrs((3, 3), (1, 1), (1, 1), False), 8),
        (AveragePoolAttrs((3, 3), (1, 1), (1, 1), True), 8),
    ],
    ids=["global", "2x2", "3x3", "3x3 counting padding"],
)
def test_average_pool(attrs: AveragePoolAttrs, size: int, draw: Generator, tmp_path: Path) -> None:
    for i, zero_point in enumerate((*ZEROS, *ZEROS)):
        x = drawn(draw, (0, 55)[i % 2])
        y = grid(float(nudged(x.filled()[0] * (2.0, 1.0, 0.5, 0.25)[i % 4], draw)), zero_point)
        program = one_op(Kind.AVERAGE_POOL, attrs, [(16, 8, 8)], [x], (16, size, size), y)
        check(program, [on_grid(x, torch.randint(0, 256, (3, 16, 8, 8), generator=draw))], tmp_path)


MOVES: dict[str, tuple[Kind, Attrs, tuple[int, ...], tuple[int, ...]]] = {
    "clamp": (Kind.CLAMP, ClampAttrs(), (6, 5, 7), (6, 5, 7)),
    "resize": (Kind.RESIZE, ResizeAttrs((2, 3)), (6, 5, 7), (6, 10, 21)),
    "permute": (Kind.PERMUTE, PermuteAttrs((0, 2, 3, 1)), (6, 5, 7), (5, 7, 6)),
    "pad": (Kind.PAD, PadAttrs(((0, 0), (1, 2), (0, 1), (2, 0))), (6, 5, 7), (9, 6, 9)),
    "reflect": (Kind.PAD, PadAttrs(((0, 0), (0, 0), (1, 2), (2, 1)), "reflect"), (6, 5, 7), (6, 8, 10)),
    "circular": (Kind.PAD, PadAttrs(((0, 0), (0, 0), (1, 2), (2, 1)), "circular"), (6, 5, 7), (6, 8, 10)),
    "slice": (Kind.SLICE, SliceAttrs(2, 1, 4, 2), (6, 5, 7), (6, 2, 7)),
    "max pool": (Kind.MAX_POOL, MaxPoolAttrs((3, 3), (2, 2), (1, 1), (1, 1)), (6, 9, 9), (6, 5, 5)),
}


@pytest.mark.parametrize("name", MOVES)
def test_what_moves_integers(name: str, draw: Generator, tmp_path: Path) -> None:
    kind, attrs, shape, result = MOVES[name]
    x = drawn(draw)
    program = one_op(kind, attrs, [shape], [x], result, x)
    check(program, [on_grid(x, torch.randint(0, 256, (3, *shape), generator=draw))], tmp_path)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_tables(function: str, draw: Generator, tmp_path: Path) -> None:
    x, arguments = grid(0.03, 110), TABLE_ARGUMENTS.get(function, ())
    fixed = fixed_grid(function, 8)
    y = Grid(0, 255, None, *fixed) if fixed is not None else grid(0.05, 90)
    attrs = LookupAttrs(function, arguments)
    program = one_op(Kind.LOOKUP, attrs, [(7, 5, 3)], [x], (7, 5, 3), y)
    program = replace(program, consts={"y": Const("y", table_of(attrs, x, y), y)})
    check(program, [on_grid(x, torch.randint(0, 256, (3, 7, 5, 3), generator=draw))], tmp_path)


def residual(
    x: Grid, own: Grid, y: Grid, scales: Tensor, bias: Tensor | None, weight: Tensor, peer: str
) -> QuantizedProgram:
    """x -> r -> i -> conv, and the sum of that and `peer`: r, or i, which the conv reads itself; then a last conv."""
    ones, shape = torch.ones(16), ("batch", 16, 12, 12)
    point = ConvAttrs((1, 1), ((0, 0), (0, 0)), (1, 1), 1)
    eye = torch.eye(16).reshape(16, 16, 1, 1)
    start = one_op(Kind.CONV, point, [shape[1:]], [x], shape[1:], x, eye, ones)
    quantize, copy = start.ops[:2]
    grids = {"r": x, "i": x, "c": own, "y": y, "o": y, "o.d": None}
    values = {n: start.values[n] for n in ("x0", "x0.q")} | {n: Value(n, shape, g, "given") for n, g in grids.items()}
    zero = torch.zeros(16, dtype=torch.int32)
    consts = {**start.consts, "w2": Const("w2", weight.to(torch.int8), Grid(-127, 127, 0, scales, zero))}
    ops = (
        quantize,
        replace(copy, outputs=("r",)),
        replace(copy, inputs=("r",), outputs=("i",)),
        Op(Kind.CONV, ("i",), ("c",), CONV, weight="w2", bias=bias),
        Op(Kind.ADD, ("c", peer), ("y",), AddAttrs()),
        replace(copy, inputs=("y",), outputs=("o",)),
        Op(Kind.DEQUANTIZE, ("o",), ("o.d",)),
    )
    return replace(start, ops=ops, values=values, consts=consts, outputs=("o.d",))


@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("peer", ["r", "i"], ids=["merged", "on its own"])
def test_sum_with_a_conv(peer: str, biased: bool, draw: Generator, tmp_path: Path) -> None:
    for i, zero_point in enumerate((*ZEROS, *ZEROS)):
        x, weight = drawn(draw, (0, 13, 100)[i % 3]), torch.zeros(16, 16, 3, 3)
        weight[torch.arange(16), torch.arange(16)] = torch.randint(-127, 128, (16, 3, 3), generator=draw).float()
        y = grid(float(nudged(x.filled()[0] * (2.0, 6.0)[i % 2], draw)), zero_point)
        own = grid(float(y.filled()[0]) * uniform(draw, 0.5, 1.5), (0, 90, 128, 200, 131)[i % 5])
        bias = torch.randint(-2000, 2000, (16,), generator=draw).int() if biased else None
        program = residual(x, own, y, nudged(torch.ones(16), draw), bias, weight, peer)
        (form,) = sum_forms(program).values()
        assert (form.conv, form.merged) == ("c", peer == "r")
        z = int(x.filled()[1])
        near = torch.randint(max(0, z - 1), z + 2, (4, 16, 12, 12), generator=draw)
        check(program, [on_grid(x, near)], tmp_path)


def test_a_sum_merged_into_a_conv_is_not_rounded_in_between(draw: Generator) -> None:
    x, own, y = grid(0.1, 0), grid(0.4, 128), grid(0.1, 0)
    weight = torch.zeros(16, 16, 3, 3)
    weight[:, :, 1, 1] = torch.eye(16)
    q = torch.arange(256.0).repeat(16 * 144 // 256).reshape(1, 16, 12, 12)
    program = residual(x, own, y, torch.full((16,), 0.1), None, weight, "r")
    _, values = Interpreter(program, ARITHMETICS["openvino/x86"]).run_with_taps([on_grid(x, q)])
    # q + q / 10, of which the conv's part is never rounded to its own steps of 4
    assert torch.equal(values["y"], torch.round(q * 1.1).clamp(max=255))
    assert "c" not in values


@pytest.mark.parametrize("pooled", ["neither", "both"])
def test_sum_of_two_values(pooled: str, draw: Generator, tmp_path: Path) -> None:
    for i, zero_point in enumerate((*ZEROS, *ZEROS)):
        a, b = drawn(draw, (0, 13, 128)[i % 3]), drawn(draw, (0, 90, 7, 200)[i % 4])
        a = grid(float(nudged(b.filled()[0] * (2.0, 0.5, 3.0)[i % 3], draw)), int(a.filled()[1]))
        y = grid(float(nudged(b.filled()[0] * (2.0, 4.0)[i % 2], draw)), zero_point)
        shape = (16, 9, 9)
        program = one_op(Kind.ADD, AddAttrs(), [shape, shape], [a, b], shape, y)
        if pooled == "both":
            program = behind_pools(program, a, b)
        assert [form.conv for form in sum_forms(program).values()] == [None]
        inputs = [on_grid(g, torch.randint(0, 256, (2, *shape), generator=draw)) for g in (a, b)]
        check(program, inputs, tmp_path)


def behind_pools(program: QuantizedProgram, a: Grid, b: Grid) -> QuantizedProgram:
    """The addition of a program, over max pools behind convs that change nothing."""
    point, eye = ConvAttrs((1, 1), ((0, 0), (0, 0)), (1, 1), 1), torch.eye(16).reshape(16, 16, 1, 1).to(torch.int8)
    zero, shape, values = torch.zeros(16, dtype=torch.int32), program.values["y"].shape, dict(program.values)
    ops = list(program.ops[:2])
    for i, item in enumerate((a, b)):
        values |= {f"{kind}{i}": Value(f"{kind}{i}", shape, item, "given") for kind in ("c", "p")}
        ops.append(Op(Kind.CONV, (f"x{i}.q",), (f"c{i}",), point, weight="w"))
        ops.append(Op(Kind.MAX_POOL, (f"c{i}",), (f"p{i}",), MaxPoolAttrs((3, 3), (1, 1), (1, 1), (1, 1))))
    ops += [replace(program.ops[2], inputs=("p0", "p1")), program.ops[3]]
    consts = {"w": Const("w", eye, Grid(-127, 127, 0, torch.ones(16), zero))}
    return replace(program, ops=tuple(ops), values=values, consts=consts)
