"""ONNX spelling of tables: the quickest nodes that give exactly the table's integers.

ONNX Runtime has no quick op for a table of one's own: Gather takes 7 ns an element on one core, ten times what its
integer and float kernels take for most functions. So a function is first written with those, and run over every
integer of its input's grid. Where an entry differs, which needs a result almost halfway between two integers, a line
over images is written as a depthwise convolution of one tap (line_table.py), and anything else as the table itself,
with Gather. The file runs on 64-bit ARM too, whose sums and products are other ones, while convolutions are the same:
they are computed here, in that arithmetic. Where a function has no one float result, no entry may come near a tie: the
scale that its kernel is given is then moved in its last bits, until every entry is the same and away from ties.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from edgeqat.interpreter.arithmetic.onnxruntime_arm import OnnxRuntimeArm64
from edgeqat.lookup import away_from_ties, stored_table
from edgeqat.lowering.line_table import Line, line_of
from edgeqat.lowering.onnx_session import OnnxSession
from edgeqat.lowering.onnx_writer import INT8_SHIFT, IR_VERSION, OPSET, STORED_MAX, Writer
from edgeqat.op_attrs import LookupAttrs
from edgeqat.program import Grid, Kind, Op, QuantizedProgram

__all__ = ["ARITHMETICS_OF_A_FILE", "along", "exact_in_kernels", "gather", "kernels", "lines"]

ARITHMETICS_OF_A_FILE = ("onnxruntime/x86", "onnxruntime/x86-avx2", "onnxruntime/arm64")

IMAGE_DIMS = 4

Build = Callable[[Writer, str, Op], None]

ONE_FLOAT_RESULT = frozenset({"leaky_relu", "clamp", "neg", "abs", "subtract_from"})
"""Functions of single float operations, which IEEE 754 defines to the bit."""

OF_A_NUMBER: Mapping[str, Callable[[Sequence[float]], tuple[Kind, float, float]]] = {
    "hardsigmoid": lambda arguments: (Kind.ADD, 1 / 6, 0.5),
    "shift": lambda arguments: (Kind.ADD, 1.0, arguments[0]),
    "scale": lambda arguments: (Kind.MUL, 1.0, arguments[0]),
    "divide": lambda arguments: (Kind.MUL, 1.0, 1 / arguments[0]),
}
"""Functions that are a sum or product with a number: of which kind, what multiplies the input's scale, the number."""

TRIED = 3 * 256 + 5
"""Elements that a function is tried on: all its integers over and over, some of them behind the last whole vector."""


def kernels(writer: Writer, op: Op, x: str, name: str) -> None:
    """Adds the nodes that compute the function of `op`, from the integers x on its input's grid to those of `name`."""
    assert isinstance(op.attrs, LookupAttrs)
    BUILDERS[op.attrs.function](writer, op, x, name, op.attrs.arguments)


def gather(writer: Writer, op: Op) -> None:
    """Adds the nodes that look each integer up in the table of `op`."""
    stored = writer.stored(stored_table(writer.program, op).numpy())
    if writer.storage == "int8":  # a negative index counts from the end: entry 128 is that of -128, the first of all
        stored = np.roll(np.pad(stored, (0, STORED_MAX + 1 - len(stored)), mode="edge"), -INT8_SHIFT)
    table = writer.initializer(writer.own_name(f"{op.name}:table"), stored)
    int32 = writer.onnx.TensorProto.INT32
    writer.node("Gather", [table, writer.result("i", "Cast", [op.inputs[0]], {"to": int32})], op.name, {"axis": 0})


def along(writer: Writer, op: Op, line: Line) -> None:
    """Adds the depthwise convolution that a line is."""
    channels, scale = int(writer.program.values[op.name].shape[1]), np.float32(line.scale)
    weight = [np.full((channels, 1, 1, 1), line.weight, np.int8), scale, np.int8(0)]
    input_scale, _ = writer.program.grid_of(op.inputs[0]).filled()
    bias = [np.full(channels, line.bias, np.int32), input_scale.numpy() * scale]
    parameters = [
        writer.result("d", "DequantizeLinear", [writer.constant(np.asarray(array)) for array in arrays])
        for arrays in (weight, bias)
    ]
    attributes = {"group": channels, "kernel_shape": [1, 1]}
    writer.computed(op, "Conv", [writer.dequantize(op.inputs[0]), *parameters], attributes)


def lines(program: QuantizedProgram, without: frozenset[str]) -> Mapping[str, Line]:
    """The lookups of images that are lines, by name; `without` those named."""
    found = {}
    for op in program.ops:
        shape = program.values[op.name].shape
        image = len(shape) == IMAGE_DIMS and isinstance(shape[1], int)
        if op.kind is Kind.LOOKUP and image and op.name not in without:
            line = line_of(program, op, ARITHMETICS_OF_A_FILE)
            if line is not None:
                found[op.name] = line
    return found


def exact_in_kernels(program: QuantizedProgram) -> frozenset[str]:
    """The lookups, by name, whose function ONNX Runtime's kernels compute to the very integers of the table, anywhere.

    Raises:
        MissingRuntimeError: onnx or onnxruntime is not installed.
    """
    ops = [op for op in program.ops if isinstance(op.attrs, LookupAttrs) and op.attrs.function in BUILDERS]
    if not ops:
        return frozenset()
    tables = [stored_table(program, op) for op in ops]
    writer = Writer(program)
    names = [f"#try{i}" for i in range(len(ops))]
    for op, name in zip(ops, names, strict=True):
        kernels(writer, op, "#q", name)
    onnx, uint8 = writer.onnx, writer.onnx.TensorProto.UINT8
    outputs = [onnx.helper.make_tensor_value_info(name, uint8, None) for name in names]
    graph = onnx.helper.make_graph(
        writer.nodes,
        "tables",
        [onnx.helper.make_tensor_value_info("#q", uint8, [None])],
        outputs,
        list(writer.initializers.values()),
    )
    opset = [onnx.helper.make_opsetid("", OPSET)]
    model = onnx.helper.make_model(graph, opset_imports=opset, ir_version=IR_VERSION)
    session, here = OnnxSession(model.SerializeToString()), list[Op]()
    for count in {len(table) for table in tables}:
        q = torch.arange(TRIED) % count
        found = zip(ops, tables, session.run([q.to(torch.uint8)]), strict=True)
        here += [op for op, table, y in found if len(table) == count and torch.equal(y, table[q])]
    return frozenset(op.name for op in here if _same_on_arm(program, op))


def _same_on_arm(program: QuantizedProgram, op: Op) -> bool:
    """Whether kernels of 64-bit ARM give the table, which those here do."""
    assert isinstance(op.attrs, LookupAttrs)
    function, arguments = op.attrs.function, op.attrs.arguments
    x_grid, grid, table = program.grid_of(op.inputs[0]), program.grid_of(op.name), stored_table(program, op)
    s_x, _ = x_grid.filled()
    q = torch.arange(x_grid.qmin, x_grid.qmax + 1.0)
    arm = OnnxRuntimeArm64()
    if function == "square":
        return torch.equal(arm.mul(q, x_grid, q, x_grid, grid), table.float())
    if function in OF_A_NUMBER:
        kind, factor, value = OF_A_NUMBER[function](arguments)
        number = Grid(0, 255, None, torch.tensor(abs(value), dtype=torch.float32), torch.tensor(int(value < 0)))
        scaled = replace(x_grid, scale=torch.tensor(float(s_x) * factor, dtype=torch.float32))
        compute = arm.add if kind is Kind.ADD else arm.mul
        return torch.equal(compute(q, scaled, torch.tensor([float(value >= 0)]), number, grid), table.float())
    if function in ONE_FLOAT_RESULT:
        return True
    return _moved(program, op) is not None


def _moved(program: QuantizedProgram, op: Op) -> Grid | None:
    """The input's grid as the function's kernels are given it, with another scale where that is needed; or None."""
    assert isinstance(op.attrs, LookupAttrs)
    function, x_grid = op.attrs.function, program.grid_of(op.inputs[0])
    if function in ONE_FLOAT_RESULT or function in OF_A_NUMBER or function == "square":
        return x_grid
    return away_from_ties(op.attrs, x_grid, program.grid_of(op.name))


def _dequantize(writer: Writer, x: str, op: Op, factor: float = 1.0) -> str:
    """The float tensor of x, its scale moved where that is needed, and multiplied."""
    moved = _moved(writer.program, op)
    scale, zero_point = (writer.program.grid_of(op.inputs[0]) if moved is None else moved).filled()
    s = writer.constant(np.asarray(np.float32(float(scale) * factor)))
    return writer.result("d", "DequantizeLinear", [x, s, writer.constant(np.asarray(int(zero_point), np.uint8))])


def _number(writer: Writer, value: float) -> str:
    """A number as one step of a grid, so that integer kernels take it."""
    q, zero = (1, 0) if value >= 0 else (0, 1)
    scale = writer.constant(np.asarray(np.float32(abs(value))))
    integers = [writer.constant(np.asarray(v, np.uint8)) for v in (q, zero)]
    return writer.result("d", "DequantizeLinear", [integers[0], scale, integers[1]])


def _quantize(writer: Writer, y: str, op: Op, name: str) -> None:
    writer.quantize(y, op.name, name)


def _plain(op_type: str, *attributes: str) -> Callable[..., None]:
    """DequantizeLinear -> op_type -> QuantizeLinear; the arguments become these attributes."""

    def build(writer: Writer, op: Op, x: str, name: str, arguments: Sequence[float]) -> None:
        floats = _dequantize(writer, x, op)
        given: dict[str, Any] = dict(zip(attributes, arguments, strict=False))
        _quantize(writer, writer.result("f", op_type, [floats], given), op, name)

    return build


def _tanh(writer: Writer, op: Op, x: str, name: str, arguments: Sequence[float]) -> None:
    """tanh(x) = 2 sigmoid(2 x) - 1: on its fixed grid, the integers are those of sigmoid(2 x) on sigmoid's."""
    grid = writer.program.grid_of(op.name)
    bits = grid.qmax.bit_length()
    y = writer.result("f", "Sigmoid", [_dequantize(writer, x, op, 2.0)])
    scale, zero = writer.constant(np.asarray(np.float32(2.0**-bits))), writer.constant(np.asarray(0, np.uint8))
    if grid.qmax == STORED_MAX:
        writer.node("QuantizeLinear", [y, scale, zero], name)
    else:
        writer.clip(writer.result("q", "QuantizeLinear", [y, scale, zero]), grid, name)


def _hardsigmoid(writer: Writer, op: Op, x: str, name: str, arguments: Sequence[float]) -> None:
    """x / 6 + 1 / 2; the output's grid clamps it."""
    y = writer.result("f", "Add", [_dequantize(writer, x, op, 1 / 6), _number(writer, 0.5)])
    _quantize(writer, y, op, name)


def _with_number(op_type: str, invert: bool = False) -> Callable[..., None]:
    def build(writer: Writer, op: Op, x: str, name: str, arguments: Sequence[float]) -> None:
        value = 1 / arguments[0] if invert else arguments[0]
        y = writer.result("f", op_type, [_dequantize(writer, x, op), _number(writer, value)])
        _quantize(writer, y, op, name)

    return build


def _square(writer: Writer, op: Op, x: str, name: str, arguments: Sequence[float]) -> None:
    floats = _dequantize(writer, x, op)
    _quantize(writer, writer.result("f", "Mul", [floats, floats]), op, name)


def _float(writer: Writer, value: float) -> str:
    return writer.constant(np.asarray(np.float32(value)))


def _gelu(writer: Writer, op: Op, x: str, name: str, arguments: Sequence[float]) -> None:
    """x / 2 (1 + erf(x / sqrt 2)), as ONNX Runtime's optimiser knows it."""
    floats = _dequantize(writer, x, op)
    erf = writer.result("f", "Erf", [writer.result("f", "Div", [floats, _float(writer, math.sqrt(2))])])
    y = writer.result("f", "Mul", [floats, writer.result("f", "Add", [erf, _float(writer, 1.0)])])
    _quantize(writer, writer.result("f", "Mul", [y, _float(writer, 0.5)]), op, name)


def _gelu_tanh(writer: Writer, op: Op, x: str, name: str, arguments: Sequence[float]) -> None:
    """x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))."""
    floats = _dequantize(writer, x, op)
    cube = writer.result("f", "Mul", [writer.result("f", "Mul", [floats, floats]), floats])
    inner = writer.result("f", "Add", [floats, writer.result("f", "Mul", [cube, _float(writer, 0.044715)])])
    tanh = writer.result("f", "Tanh", [writer.result("f", "Mul", [inner, _float(writer, math.sqrt(2 / math.pi))])])
    y = writer.result("f", "Mul", [floats, writer.result("f", "Add", [tanh, _float(writer, 1.0)])])
    _quantize(writer, writer.result("f", "Mul", [y, _float(writer, 0.5)]), op, name)


def _subtract_from(writer: Writer, op: Op, x: str, name: str, arguments: Sequence[float]) -> None:
    y = writer.result("f", "Sub", [_float(writer, arguments[0]), _dequantize(writer, x, op)])
    _quantize(writer, y, op, name)


def _elu(writer: Writer, op: Op, x: str, name: str, arguments: Sequence[float]) -> None:
    """selu and celu are the same function with a scale outside, or a gain inside."""
    alpha, scale, gain = arguments
    floats = _dequantize(writer, x, op)
    inner = floats if gain == 1 else writer.result("f", "Mul", [floats, _float(writer, gain)])
    y = writer.result("f", "Elu", [inner], {"alpha": alpha})
    _quantize(writer, y if scale == 1 else writer.result("f", "Mul", [y, _float(writer, scale)]), op, name)


def _clamp(writer: Writer, op: Op, x: str, name: str, arguments: Sequence[float]) -> None:
    """Where the output's grid begins and ends at the bounds, it clamps; a concatenation of one changes the grid."""
    _quantize(writer, writer.result("f", "Concat", [_dequantize(writer, x, op)], {"axis": 0}), op, name)


BUILDERS: Mapping[str, Callable[[Writer, Op, str, str, Sequence[float]], None]] = {
    "sigmoid": _plain("Sigmoid"),
    "hardsigmoid": _hardsigmoid,
    "tanh": _tanh,
    "leaky_relu": _plain("LeakyRelu", "alpha"),
    "elu": _elu,
    "clamp": _clamp,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "subtract_from": _subtract_from,
    "softplus": _plain("Softplus"),
    "mish": _plain("Mish"),
    "neg": _plain("Neg"),
    "abs": _plain("Abs"),
    "exp": _plain("Exp"),
    "square": _square,
    "scale": _with_number("Mul"),
    "divide": _with_number("Mul", invert=True),
    "shift": _with_number("Add"),
}
"""Functions that ONNX Runtime has kernels for."""
