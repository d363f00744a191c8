"""LiteRT spelling of tables."""

from __future__ import annotations

import numpy as np

from edgeqat.lowering.litert_writer import INT8_SHIFT, Writer
from edgeqat.program import Op

__all__ = ["look_up"]


def look_up(writer: Writer, op: Op) -> None:
    """Adds the ops that look each integer up in the table of `op`."""
    data = writer.program.consts[op.name].data
    assert data is not None
    x, order = writer.stored[op.inputs[0]].index, writer.stored[op.inputs[0]].order
    shape, grid = writer.shape_in(op.name, order), writer.program.grid_of(op.name)
    integers, entries = writer.tensor(shape, None, dtype="INT32"), writer.tensor(shape, None, dtype="INT32")
    writer.op("CAST", [x], [integers])
    writer.op("ADD", [integers, writer.constant(np.array(INT8_SHIFT, np.int32))], [entries])
    table = writer.activations(data.numpy(), grid)
    writer.op("GATHER", [table, entries], [writer.make(op.name, order)], {"axis": 0})
