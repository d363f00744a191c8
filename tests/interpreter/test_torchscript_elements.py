"""torch's integer products, concatenations and tables, and what only moves integers, on every engine: zero steps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Generator

from edgeqat.lookup import FUNCTIONS, fixed_grid, table_of
from edgeqat.lowering.torchscript_lookup import kernels_of
from edgeqat.op_attrs import Attrs, ClampAttrs, ConcatAttrs, LookupAttrs, MulAttrs, ResizeAttrs
from edgeqat.program import Const, Grid, Kind
from interpreter.test_torchscript_arithmetic import ENGINES, check, integer, nudged, uniform
from programs import TABLE_ARGUMENTS, grid, on_grid, one_op


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def draw() -> Generator:
    return Generator().manual_seed(7)


def drawn(draw: Generator) -> Grid:
    return grid(2 ** uniform(draw, -8, 0), integer(draw, 0, 256))


@pytest.mark.parametrize("shape", [(65536,), (13, 5, 3), (16, 8, 8)], ids=str)
def test_mul(shape: tuple[int, ...], engine: str, draw: Generator, tmp_path: Path) -> None:
    for _ in range(12):
        a, b = drawn(draw), drawn(draw)
        s_a, s_b = a.filled()[0], b.filled()[0]
        # A multiplier of a half, moved by some units in the last place, puts every other product on a tie.
        s_y = float(nudged(s_a * s_b * 2.0 * integer(draw, 1, 200), draw))
        y = grid(s_y, integer(draw, 0, 256))
        left = torch.randint(0, 256, (2, *shape), generator=draw)
        right = torch.randint(0, 256, (2, *shape), generator=draw)
        program = one_op(Kind.MUL, MulAttrs(), [shape, shape], [a, b], shape, y)
        check(program, [on_grid(a, left), on_grid(b, right)], engine, tmp_path)


@pytest.mark.parametrize("smaller", [(6, 1, 1), (1, 9, 8)], ids=str)
def test_mul_of_different_shapes(smaller: tuple[int, ...], engine: str, draw: Generator, tmp_path: Path) -> None:
    for swapped in (False, True):
        a, b = drawn(draw), drawn(draw)
        y = grid(float(a.filled()[0] * b.filled()[0] * 100), integer(draw, 0, 256))
        sides = [((6, 9, 8), a), (smaller, b)]
        (s0, g0), (s1, g1) = reversed(sides) if swapped else sides
        inputs = [on_grid(g, torch.randint(0, 256, (3, *s), generator=draw)) for s, g in ((s0, g0), (s1, g1))]
        check(one_op(Kind.MUL, MulAttrs(), [s0, s1], [g0, g1], (6, 9, 8), y), inputs, engine, tmp_path)


@pytest.mark.parametrize("rest", [(), (5, 5), (1, 1), (5,)], ids=["features", "images", "pooled", "sequences"])
def test_concat(rest: tuple[int, ...], engine: str, draw: Generator, tmp_path: Path) -> None:
    for widths in [(256, 3, 19)] * 6 + [(64, 65, 149), (63, 128, 87)] * 6:
        a, b = drawn(draw), drawn(draw)
        # A scale of twice an input's, moved by some units in the last place, puts every other integer on a tie.
        s_y = float(nudged(a.filled()[0] * 2.0, draw)) if integer(draw, 0, 2) else float(b.filled()[0]) * 1.3
        y = grid(s_y, integer(draw, 0, 256))
        shapes = [(n, *rest) for n in widths]
        inputs = [
            on_grid(g, torch.randint(0, 256, (2, *shape), generator=draw))
            for g, shape in zip((a, b, y), shapes, strict=True)
        ]
        program = one_op(Kind.CONCAT, ConcatAttrs(1), shapes, [a, b, y], (278, *rest), y)
        check(program, inputs, engine, tmp_path)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_tables(function: str, engine: str, draw: Generator, tmp_path: Path) -> None:
    x = grid(0.03, 110)
    values = FUNCTIONS[function].compute(
        (torch.arange(256.0) - 110).double() * 0.03, *TABLE_ARGUMENTS.get(function, ())
    )
    fixed = fixed_grid(function, 8)
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    y = Grid(0, 255, None, *fixed) if fixed is not None else grid((high - low) / 255, round(-low * 255 / (high - low)))
    attrs = LookupAttrs(function, TABLE_ARGUMENTS.get(function, ()))
    for shape in ((256,), (7, 5, 3)):
        program = one_op(Kind.LOOKUP, attrs, [shape], [x], shape, y)
        program = replace(program, consts={"y": Const("y", table_of(attrs, x, y), y)})
        check(program, [on_grid(x, torch.randint(0, 256, (3, *shape), generator=draw))], engine, tmp_path)
        data = program.consts["y"].data
        assert data is not None
        data[130] ^= 1  # a table that no kernel computes
        assert kernels_of(program, [engine]) == {}
        check(program, [on_grid(x, torch.randint(0, 256, (3, *shape), generator=draw))], engine, tmp_path)


@pytest.mark.parametrize(
    ("kind", "attrs", "shape", "result"),
    [
        (Kind.CLAMP, ClampAttrs(), (6, 5, 7), (6, 5, 7)),
        (Kind.RESIZE, ResizeAttrs((2, 3)), (6, 5, 7), (6, 10, 21)),
        (Kind.RESIZE, ResizeAttrs((2,)), (6, 5), (6, 10)),
    ],
    ids=["clamp", "resize", "resize 1d"],
)
def test_what_moves_integers(
    kind: Kind,
    attrs: Attrs,
    shape: tuple[int, ...],
    result: tuple[int, ...],
    engine: str,
    draw: Generator,
    tmp_path: Path,
) -> None:
    x = drawn(draw)
    program = one_op(kind, attrs, [shape], [x], result, x)
    check(program, [on_grid(x, torch.randint(0, 256, (3, *shape), generator=draw))], engine, tmp_path)
