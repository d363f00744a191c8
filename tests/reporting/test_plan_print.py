"""The plan as a table that can be read, however wide the terminal."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console

import edgeqat as eq
from edgeqat.reporting.plan_print import print_plan
from edgeqat.zoo import edge_model


@pytest.fixture(scope="module")
def planned() -> eq.Plan:
    return eq.plan(edge_model().eval(), torch.zeros(2, 3, 32, 32))


@pytest.mark.parametrize(
    ("columns", "head", "left_out"),
    [
        (80, "op kind runs why", "weight, in, out, fused with"),
        (120, "op kind runs fused with why", "weight, in, out"),
        (140, "op kind runs in out fused with why", "weight"),
        (180, "op kind runs in weight out fused with why", None),
    ],
)
def test_columns_are_chosen_so_that_no_word_is_broken(
    planned: eq.Plan, columns: int, head: str, left_out: str | None
) -> None:
    text = io.StringIO()
    print_plan(planned, Console(file=text, width=columns, highlight=False))
    lines = text.getvalue().splitlines()
    assert max(map(len, lines)) <= columns
    assert " ".join(lines[1].split()) == head
    words = text.getvalue().split()
    for row in planned.rows():
        assert row.op in words
        assert all(word in words for word in row.reason.split())
    assert ("left out for want of room" in text.getvalue()) == (left_out is not None)
    assert left_out is None or lines[-1] == f"left out for want of room: {left_out}; --json shows them"
