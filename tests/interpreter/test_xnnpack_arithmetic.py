"""XNNPACK's integer ops against the reference, op by op, integer by integer. No tolerance.

See `op_cases` for what is tried. Writing a file takes seconds, so many ops share one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Generator

from edgeqat.interpreter.arithmetic import ARITHMETICS
from edgeqat.interpreter.run import Interpreter
from edgeqat.lowering.executorch_session import ExecutorchSession
from edgeqat.lowering.to_executorch import spell
from edgeqat.program import Kind
from edgeqat.replay.kernels import arithmetic_here
from op_cases import (
    Case,
    accumulators_of_full_range,
    average_pools,
    concatenations,
    convs_and_linear_layers,
    merged,
    moves,
    quantizations,
    sums_and_products,
    tables,
)

pytestmark = pytest.mark.skipif(arithmetic_here("executorch") is None, reason="XNNPACK's kernels are tried on x86")


@pytest.fixture
def draw() -> Generator:
    return Generator().manual_seed(7)


def check(cases: Sequence[Case], folder: Path) -> None:
    """Asserts that every value of the runtime is the reference's; the batch of all cases is the same."""
    program, inputs = merged([case for case, _ in cases]), [tensor for _, given in cases for tensor in given]
    spelling = spell(program, None)
    path = folder / spelling.file_name
    path.write_bytes(spelling.data)
    outputs, inside = ExecutorchSession(path, "xnnpack", 1, spelling.taps).run_with_taps(inputs)
    expected, values = Interpreter(program, ARITHMETICS["xnnpack"]).run_with_taps(inputs)
    assert set(inside) == set(values)
    wrong = {name: int((inside[name] != integers).sum()) for name, integers in values.items()}
    assert {name: n for name, n in wrong.items() if n} == {}
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))


def test_quantize(draw: Generator, tmp_path: Path) -> None:
    check(quantizations(draw), tmp_path)


def test_convs_and_linear_layers(draw: Generator, tmp_path: Path) -> None:
    check(convs_and_linear_layers(draw), tmp_path)


def test_accumulators_of_full_range(draw: Generator, tmp_path: Path) -> None:
    check(accumulators_of_full_range(draw), tmp_path)


@pytest.mark.parametrize("kind", [Kind.ADD, Kind.MUL])
def test_sums_and_products(kind: Kind, draw: Generator, tmp_path: Path) -> None:
    check(sums_and_products(kind, draw), tmp_path)


def test_concatenations(draw: Generator, tmp_path: Path) -> None:
    check(concatenations(draw), tmp_path)


def test_average_pools(draw: Generator, tmp_path: Path) -> None:
    check(average_pools(draw), tmp_path)


def test_what_moves_integers(draw: Generator, tmp_path: Path) -> None:
    check(moves(draw), tmp_path)


def test_tables(draw: Generator, tmp_path: Path) -> None:
    check(tables(draw), tmp_path)
