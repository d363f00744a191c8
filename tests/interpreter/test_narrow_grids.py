"""Activations of 2 to 7 bits: an 8-bit kernel's result, clamped where the grid ends. Zero steps.

Every op is tried with a grid of its own width for each of its values, see `op_cases.narrowed`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Generator, Tensor

from edgeqat.interpreter.arithmetic import ARITHMETICS
from edgeqat.interpreter.run import Interpreter
from edgeqat.lookup import fixed_grid, table_of
from edgeqat.lowering.executorch_session import ExecutorchSession
from edgeqat.lowering.onnx_lookup import exact_in_kernels
from edgeqat.lowering.onnx_session import float_ops
from edgeqat.lowering.to_executorch import spell
from edgeqat.lowering.to_onnx import spell_model
from edgeqat.op_attrs import AveragePoolAttrs, LookupAttrs, MatmulAttrs
from edgeqat.program import Const, Grid, Kind, QuantizedProgram
from edgeqat.replay.kernels import arithmetic_here
from helpers import EXACT_ARITHMETIC
from onnx_kernels import check
from op_cases import (
    Case,
    average_pools,
    concatenations,
    convs_and_linear_layers,
    merged,
    moves,
    narrowed,
    quantizations,
    sums_and_products,
    tables,
)
from programs import grid, one_op

EVERYWHERE: dict[str, Callable[[Generator], Sequence[Case]]] = {
    "quantize": quantizations,
    "conv and linear": convs_and_linear_layers,
    "add": lambda draw: sums_and_products(Kind.ADD, draw),
    "mul": lambda draw: sums_and_products(Kind.MUL, draw),
    "concat": concatenations,
    "average pool": average_pools,
    "moves": moves,
    "table": tables,
}


def pools_with_a_grid_of_their_own(draw: Generator) -> list[Case]:
    """Whole planes and windows."""
    cases: list[Case] = []
    for attrs, result in ((AveragePoolAttrs(), (7, 1, 1)), (AveragePoolAttrs((2, 2), (2, 2), (0, 0)), (7, 3, 4))):
        for factor in (0.5, 1.0, 1.7):
            x, y = grid(0.05, 30), grid(0.05 * factor, 90)
            program = one_op(Kind.AVERAGE_POOL, attrs, [(7, 6, 8)], [x], result, y)
            cases.append((program, [torch.zeros(20, 7, 6, 8)]))
    return cases


def matrix_products(draw: Generator) -> list[Case]:
    """Of two values."""
    a, b = grid(0.03, 100), grid(0.05, 30)
    y = grid(0.03 * 0.05 * 32, 120)
    program = one_op(Kind.MATMUL, MatmulAttrs(), [(3, 9, 5), (3, 5, 8)], [a, b], (3, 9, 8), y)
    return [(program, [torch.zeros(2, 3, 9, 5), torch.zeros(2, 3, 5, 8)])]


def moves_in_onnx(draw: Generator) -> list[Case]:
    """Without a max pool that torch gives one row less than ONNX: its last windows begin in the padding."""
    return [
        (program, given)
        for program, given in moves(draw)
        if program.values["y"].shape != ("batch", 13, 3, 4) or given[0].shape[2] != 5
    ]


ONNX = EVERYWHERE | {
    "moves": moves_in_onnx,
    "pool's own grid": pools_with_a_grid_of_their_own,
    "matmul": matrix_products,
}
FUSED = {
    "conv and linear": "QLinearConv",
    "add": "QLinearAdd",
    "mul": "QLinearMul",
    "concat": "QLinearConcat",
    "average pool": "QLinearGlobalAveragePool",
    "pool's own grid": "QLinearAveragePool",
    "matmul": "QLinearMatMul",
}


NIGHT = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"


@pytest.fixture
def draw() -> Generator:
    return Generator().manual_seed(11)


def narrow(cases: Sequence[Case], draw: Generator) -> tuple[QuantizedProgram, list[Tensor]]:
    """All of them, narrowed, in one program."""
    made = [narrowed(case, draw) for case in cases]
    return merged([program for program, _ in made]), [tensor for _, given in made for tensor in given]


@EXACT_ARITHMETIC
@pytest.mark.usefixtures("onnx_kernels")
@pytest.mark.parametrize("name", ONNX)
def test_onnx_runtime_ends_where_the_grid_does(name: str, draw: Generator) -> None:
    program, inputs = narrow(ONNX[name](draw), draw)
    check(program, inputs, FUSED.get(name, "QuantizeLinear"))
    left = float_ops(spell_model(program).SerializeToString())
    assert name == "table" or not left, left


@pytest.mark.skipif(arithmetic_here("executorch") is None, reason="XNNPACK's kernels are tried on x86")
def test_xnnpack_ends_where_the_grid_does(draw: Generator, tmp_path: Path) -> None:
    """All cases by night: a file of them takes minutes to write."""
    cases = [case for make in EVERYWHERE.values() for case in make(draw)]
    program, inputs = narrow(cases if NIGHT else cases[::7], draw)
    spelling = spell(program, None)
    path = tmp_path / spelling.file_name
    path.write_bytes(spelling.data)
    outputs, inside = ExecutorchSession(path, "xnnpack", 1, spelling.taps).run_with_taps(inputs)
    expected, values = Interpreter(program, ARITHMETICS["xnnpack"]).run_with_taps(inputs)
    wrong = {n: int((inside[n] != integers).sum()) for n, integers in values.items() if n in inside}
    assert set(inside) == set(values) and not any(wrong.values()), wrong
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_in_every_arithmetic_a_narrow_result_is_the_wide_one_clamped(arithmetic: str, draw: Generator) -> None:
    """So that what a simulation computes in exact mode is what a device would that clamps."""
    clamped, a = 0, ARITHMETICS[arithmetic]
    cases = [*convs_and_linear_layers(draw), *pools_with_a_grid_of_their_own(draw)]
    if not a.fuses_sums:  # OpenVINO, whose sums depend on what is before them
        cases += [case for kind in (Kind.ADD, Kind.MUL) for case in sums_and_products(kind, draw)]
        cases += concatenations(draw)
    for case in cases:
        program, inputs = narrowed(case, draw)
        narrow_grid = program.grid_of("y")
        if any(program.grid_of(name) is narrow_grid for name in program.ops[-2].inputs):
            continue
        wide = replace(program, values=program.values | {"y": replace(program.values["y"], grid=widened(narrow_grid))})
        _, found = Interpreter(program, a).run_with_taps(inputs)
        _, expected = Interpreter(wide, a).run_with_taps(inputs)
        assert torch.equal(found["y"], expected["y"].clamp(0, narrow_grid.qmax)), case[0].ops[-2].kind
        clamped += int((expected["y"] > narrow_grid.qmax).sum())
    for program, (x,) in quantizations(draw):
        item = replace(program.grid_of("y"), qmax=15)
        assert torch.equal(a.quantize(x, item), a.quantize(x, widened(item)).clamp(0, 15))
    assert clamped > 1000


def widened(narrow_grid: Grid) -> Grid:
    """The grid with 8 bits."""
    return replace(narrow_grid, qmax=255)


def table(function: str, x: Grid, bits: int) -> QuantizedProgram:
    """A program that is one table, onto the grid that the function fixes."""
    attrs, y = LookupAttrs(function), Grid(0, 2**bits - 1, None, *fixed_grid(function, bits) or ())
    program = one_op(Kind.LOOKUP, attrs, [(x.qmax + 1,)], [x], (x.qmax + 1,), y)
    return replace(program, consts={"y": Const("y", table_of(attrs, x, y), y)})


@EXACT_ARITHMETIC
def test_tables_between_grids_of_any_width_are_tried_in_kernels() -> None:
    """Each over the integers of its own input, and with the clip that ends its result."""
    functions, widths = ("sigmoid", "tanh", "hardsigmoid"), ((8, 4), (4, 8), (3, 5))
    made = [
        table(function, grid(5.3 / 2 ** (x - 1), 2 ** (x - 1) - 1, 2**x - 1), y)
        for function in functions
        for x, y in widths
    ]
    whole = merged(made)
    assert exact_in_kernels(whole) == {op.name for op in whole.ops if op.kind is Kind.LOOKUP}
