"""Tables that a node of XNNPACK computes: lines, and functions it knows, where it gives all of the table's integers.

A line is a depthwise convolution of one tap (line_table.py). Of a function XNNPACK makes a table of its own when a
model is loaded; whether that is the program's is tried here, integer by integer.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from edgeqat.lookup import stored_table
from edgeqat.lowering.executorch_file import delegate_module, file_of
from edgeqat.lowering.line_table import Line, as_image, line_of
from edgeqat.lowering.xnnpack_graph import SHIFT, Graph, Located, clamped
from edgeqat.op_attrs import LookupAttrs
from edgeqat.program import Grid, Kind, Op, QuantizedProgram
from edgeqat.replay.run_executorch import call_executorch, load_executorch

__all__ = ["exact_nodes", "function_node", "spelled_line"]

PLAIN = {
    "sigmoid": "XNNSigmoid",
    "tanh": "XNNTanh",
    "gelu": "XNNGelu",
    "exp": "XNNExp",
    "abs": "XNNAbs",
    "neg": "XNNNegate",
    "square": "XNNSquare",
}
"""Functions without arguments."""


def function_node(graph: Graph, attrs: LookupAttrs, x: Located, grid: Grid) -> Located | None:
    """Appends the node of a function; None if there is none."""
    y = Located(-1, x.shape, x.order, grid)
    node: Any = None
    bounds: tuple[float, float] | None = None
    if attrs.function in PLAIN:
        node = getattr(graph.schema, PLAIN[attrs.function])
    elif attrs.function == "leaky_relu":
        node = partial(graph.schema.XNNLeakyReLU, attrs.arguments[0])
    elif attrs.function == "elu" and attrs.arguments[1:] == (1.0, 1.0):
        node = partial(graph.schema.XNNELU, attrs.arguments[0])
    elif attrs.function == "clamp":
        node, bounds = graph.schema.XNNClamp, (attrs.arguments[0], attrs.arguments[1])
    if node is None:
        return None
    y = graph.tensor(x.shape, x.order, grid)
    graph.node(node(x.id, y.id, 0), bounds)
    return clamped(graph, y)


def spelled_line(program: QuantizedProgram, op: Op) -> Line | None:
    """The line that a lookup is written as; None where it has none, or its sizes are not those of an image."""
    image = as_image(program.values[op.name].shape)
    return None if image is None else line_of(program, op, ("xnnpack",))


def exact_nodes(program: QuantizedProgram) -> frozenset[str]:
    """Names of the lookups whose tables XNNPACK has a node for."""
    graph, made = Graph(), []
    inputs = []
    lookups = [op for op in program.ops if op.kind is Kind.LOOKUP]
    lines = frozenset(op.name for op in lookups if spelled_line(program, op) is not None)
    candidates = [op for op in lookups if op.name not in lines and _may_have_node(program, op)]
    for op in candidates:
        grid = program.grid_of(op.inputs[0])
        inputs.append(graph.input(Located(-1, (1, grid.qmax + 1), (0, 1), grid)))
    for op, x in zip(candidates, inputs, strict=True):
        assert isinstance(op.attrs, LookupAttrs)
        y = function_node(graph, op.attrs, x, program.grid_of(op.name))
        assert y is not None
        made.append(y)
    if not made:
        return lines
    for y in made:
        graph.output(y)
    module = _Called(delegate_module(*graph.serialized(), inputs, made))
    values = [torch.arange(x.shape[1])[None] - SHIFT for x in inputs]
    examples = tuple(torch.cat([value, value]).to(torch.int8) for value in values)
    data, _ = file_of(module, examples, has_floats=False)
    found = call_executorch(load_executorch(data), list(examples))
    integers = [y[0].int() + SHIFT for y in found]
    return lines | {
        op.name for op, y in zip(candidates, integers, strict=True) if torch.equal(y, stored_table(program, op).int())
    }


class _Called(nn.Module):
    def __init__(self, delegate: nn.Module) -> None:
        super().__init__()
        self.delegate = delegate

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.delegate(*inputs))


def _may_have_node(program: QuantizedProgram, op: Op) -> bool:
    graph, grid = Graph(), program.grid_of(op.name)
    assert isinstance(op.attrs, LookupAttrs)
    return function_node(graph, op.attrs, graph.input(Located(-1, (1, 2), (0, 1), grid)), grid) is not None
