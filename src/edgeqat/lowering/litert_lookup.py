"""LiteRT spelling of tables: a kernel where one gives all of their integers, else CAST, ADD and GATHER.

A table of one's own runs outside the delegate, and takes several times what a kernel does. So a line is written as a
depthwise convolution of one tap (line_table.py), and a function that LiteRT has an int8 kernel for as that kernel,
once it was run over every integer of its input's grid. Such kernels fill a table when a model is loaded, from floats
that another processor may compute otherwise in the last bits: no entry may come near a tie. Where one does, QUANTIZE
gives the same integers a scale that differs in its last bits, with which none does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from edgeqat.lookup import FUNCTIONS, away_from_ties, fixed_grid, stored_table
from edgeqat.lowering.line_table import Line, as_image, line_of
from edgeqat.lowering.litert_weighted import VALID
from edgeqat.lowering.litert_writer import INT8_SHIFT, Writer, sizes_of
from edgeqat.op_attrs import LookupAttrs
from edgeqat.program import Grid, Op, QuantizedProgram, Value
from edgeqat.replay.run_litert import call_litert, load_litert

__all__ = ["Kernel", "kernels_of", "look_up"]


class Function(NamedTuple):
    """An op of LiteRT's that is a function of one element.

    Attributes:
        op: Its name.
        options: What it is given.
        grid: Of its input; None: as the input is.
    """

    op: str
    options: Mapping[str, Any]
    grid: Grid | None = None


Kernel = Line | Function


def kernels_of(program: QuantizedProgram, engines: Sequence[str]) -> tuple[Mapping[str, Kernel], tuple[str, ...]]:
    """What computes tables, by the name of the op, and the engines on which all of it gives their very integers.

    The first engine is always among them: what it does not compute exactly stays a table.
    """
    ops = [op for op in program.ops if isinstance(op.attrs, LookupAttrs)]
    functions = _functions(program, ops)
    exact = {engine: _exact(program, functions, engine) for engine in engines}
    kernels: dict[str, Kernel] = {}
    left = set(engines)
    for op in ops:
        for wanted in (engines, engines[:1]):
            kernel: Kernel | None = line_of(program, op, [f"litert/{engine}" for engine in wanted])
            if kernel is None and all(op.name in exact[engine] for engine in wanted):
                kernel = functions[op.name]
            if kernel is not None:
                kernels[op.name] = kernel
                left &= set(wanted)
                break
    return kernels, tuple(engine for engine in engines if engine in left)


def look_up(writer: Writer, op: Op, kernel: Kernel | None) -> None:
    """Adds the op that computes the table of `op`, or those that look each integer up."""
    x, order = writer.stored[op.inputs[0]].index, writer.stored[op.inputs[0]].order
    shape, grid = writer.shape_in(op.name, order), writer.program.grid_of(op.name)
    image = as_image(shape)
    if isinstance(kernel, Line) and image is not None:
        _line(writer, op, kernel, image)
        return
    if isinstance(kernel, Function):
        _call(writer, kernel, x, writer.make(op.name, order), shape)
        return
    integers, entries = writer.tensor(shape, None, dtype="INT32"), writer.tensor(shape, None, dtype="INT32")
    writer.op("CAST", [x], [integers])
    writer.op("ADD", [integers, writer.constant(np.array(INT8_SHIFT, np.int32))], [entries])
    table = writer.activations(stored_table(writer.program, op).numpy(), grid)
    writer.op("GATHER", [table, entries], [writer.make(op.name, order)], {"axis": 0})


def _call(writer: Writer, function: Function, x: int, y: int, shape: Sequence[int | str]) -> None:
    if function.grid is not None:
        moved = writer.tensor(shape, function.grid)
        writer.op("QUANTIZE", [x], [moved])
        x = moved
    writer.op(function.op, [x], [y], function.options)


def _line(writer: Writer, op: Op, line: Line, sizes: tuple[int, int, int]) -> None:
    """Over an image as it lies in memory: every channel has the same line."""
    found, grid = writer.stored[op.inputs[0]], writer.program.grid_of(op.name)
    x_grid, shape = writer.program.grid_of(op.inputs[0]), writer.shape_in(op.name, found.order)
    x, image, result = found.index, (shape[0], *sizes), writer.make(op.name, found.order)
    if image != shape:
        x = writer.tensor(image, x_grid)
        writer.op("RESHAPE", [found.index, writer.ints(*sizes_of(image))], [x])
    y = result if image == shape else writer.tensor(image, grid)
    channels = sizes[2]
    scales, zeros = np.full(channels, line.scale, np.float32), np.zeros(channels, np.int64)
    weight = np.full((1, 1, 1, channels), line.weight, np.int8)
    bias_scales = np.float32(x_grid.per_tensor()[0]) * scales
    inputs = [
        x,
        writer.constant(weight, writer.quantization(scales, zeros, 3)),
        writer.constant(np.full(channels, line.bias, np.int32), writer.quantization(bias_scales, zeros)),
    ]
    ones = {"strideH": 1, "strideW": 1, "dilationHFactor": 1, "dilationWFactor": 1}
    writer.op("DEPTHWISE_CONV_2D", inputs, [y], {"padding": VALID, "depthMultiplier": 1, **ones})
    if image != shape:
        writer.op("RESHAPE", [y, writer.ints(*sizes_of(shape))], [result])


def _functions(program: QuantizedProgram, ops: Sequence[Op]) -> dict[str, Function]:
    """The ops that LiteRT has for lookups, by name, where their results are the same on every processor."""
    found: dict[str, Function] = {}
    for op in ops:
        assert isinstance(op.attrs, LookupAttrs)
        function, grid = _function(op.attrs), program.grid_of(op.name)
        if function is None:
            continue
        fixed = FUNCTIONS[op.attrs.function].range and fixed_grid(op.attrs.function, 8)
        if fixed and grid.per_tensor() != (float(fixed[0]), int(fixed[1])):
            continue  # the op has one grid
        x_grid = program.grid_of(op.inputs[0])
        moved = away_from_ties(op.attrs, x_grid, grid)
        if moved is not None:
            found[op.name] = function if moved is x_grid else function._replace(grid=moved)
    return found


def _function(attrs: LookupAttrs) -> Function | None:
    match attrs.function, attrs.arguments:
        case "sigmoid", _:
            return Function("LOGISTIC", {})
        case "tanh", _:
            return Function("TANH", {})
        case "gelu" | "gelu_tanh", _:
            return Function("GELU", {"approximate": attrs.function == "gelu_tanh"})
        case "elu", (1.0, 1.0, 1.0):
            return Function("ELU", {})
    return None


def _exact(program: QuantizedProgram, functions: Mapping[str, Function], engine: str) -> frozenset[str]:
    """The names of those functions that give the whole table on an engine here."""
    if not functions:
        return frozenset()
    ops = {op.name: op for op in program.ops if op.name in functions}
    values: dict[str, Value] = {}
    for name, op in ops.items():
        x_grid = program.grid_of(op.inputs[0])
        for new, grid in ((f"{name}:x", x_grid), (f"{name}:y", program.grid_of(name))):
            values[new] = Value(new, (x_grid.qmax + 1,), grid, "tried")
    inputs, outputs = (tuple(f"{name}:{end}" for name in ops) for end in "xy")
    writer = Writer(replace(program, values=values, inputs=inputs, outputs=outputs))
    for name, x, y in zip(ops, inputs, outputs, strict=True):
        _call(writer, functions[name], writer.make(x, (0,)), writer.make(y, (0,)), writer.program.values[x].shape)
    integers = [np.arange(program.grid_of(op.inputs[0]).qmax + 1) for op in ops.values()]
    feed = [(q - INT8_SHIFT).astype(np.int8) for q in integers]
    found = call_litert(load_litert(writer.model(), engine, 1), feed)
    tables = [stored_table(program, op).numpy() for op in ops.values()]
    return frozenset(
        name
        for name, y, table in zip(ops, found, tables, strict=True)
        if np.array_equal(y.view(np.uint8) ^ INT8_SHIFT, table)
    )
