"""Tables that ONNX Runtime's kernels compute on every processor."""

from __future__ import annotations

import pytest
import torch

from edgeqat.lookup import NEAR_TIE, distance_to_tie, table_of
from edgeqat.lowering import to_onnx
from edgeqat.lowering.onnx_lookup import exact_in_kernels
from edgeqat.lowering.onnx_session import OnnxSession
from edgeqat.op_attrs import LookupAttrs
from lowering.test_line_table import looked_up
from programs import grid, on_grid, own_grid


@pytest.mark.parametrize("function", ["sigmoid", "tanh"])
def test_a_scale_is_moved_where_an_entry_is_near_a_tie(function: str) -> None:
    """The table stays the same; what another machine's float kernel may make of it can no longer differ."""
    attrs, y = LookupAttrs(function, ()), own_grid(function)
    for scale in torch.linspace(0.01, 0.05, 2000).tolist():
        x = grid(scale, 110)
        if distance_to_tie(attrs, x, y) <= NEAR_TIE:
            break
    else:
        pytest.fail("none of 2,000 tables is near a tie")
    program = looked_up(function, (), x, y)
    assert exact_in_kernels(program) == {"y"}
    model = to_onnx.spell_model(program)
    given = {i.name: to_onnx.import_onnx().numpy_helper.to_array(i) for i in model.graph.initializer}
    scales = {float(array) for array in given.values() if array.dtype == "float32" and array.ndim == 0}
    factor = 2 if function == "tanh" else 1  # as twice the sigmoid of twice the input
    moved = {s / factor for s in scales if 0 < abs(s / factor / scale - 1) < 1e-3}
    assert len(moved) == 1
    other = grid(moved.pop(), 110)
    assert torch.equal(table_of(attrs, other, y), table_of(attrs, x, y))
    assert distance_to_tie(attrs, other, y) > NEAR_TIE
    (found,) = OnnxSession(model.SerializeToString()).run([on_grid(x, torch.arange(256)[None])])
    table = program.consts["y"].data
    assert table is not None
    assert torch.equal(found[0], on_grid(y, table))
