"""Spelling a quantized program as a LiteRT FlatBuffer, written directly: no converter decides on a number in it.

Every value with a grid is an int8 tensor, 128 less than its canonical integers; weights are int8 with a scale a
channel, biases int32. Images have their channels last inside the file, while its inputs and outputs are the model's
own: float32, in the model's order of dimensions, so that the file takes the FP32 model's place. Facts this relies on:

- QUANTIZE and DEQUANTIZE inside the file round as the same does on the host;
- RESHAPE takes -1, and every other op follows its input, so that one file takes any batch;
- an activation function is the clamp of the output's grid.
"""

from __future__ import annotations

import json
import struct
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from edgeqat.errors import PlanError
from edgeqat.interpreter.arithmetic.xnnpack import ONE
from edgeqat.lowering.litert_island import Islands
from edgeqat.lowering.litert_lookup import kernels_of, look_up
from edgeqat.lowering.litert_moving import move
from edgeqat.lowering.litert_weighted import CHANNELS_LAST, convolution, linear, pad_for, shortcut
from edgeqat.lowering.litert_writer import Stored, Writer, import_schema, sizes_of
from edgeqat.lowering.shortcut import find_shortcuts
from edgeqat.lowering.spelling import Spelling
from edgeqat.op_attrs import AveragePoolAttrs, ConcatAttrs
from edgeqat.program import BATCH_DIM, Kind, Op, QuantizedProgram

__all__ = ["spell", "taps_of"]

FILE_NAME = "model.tflite"

ENGINES = ("xnnpack", "builtin")

OUTPUTS_SLOT = 8
"""Of a subgraph's list of outputs, in its table."""


def spell(program: QuantizedProgram, engine: str | None) -> Spelling:
    """The LiteRT file of a program.

    Args:
        program: The program.
        engine: "xnnpack" or "builtin"; None: the first, and exact with the second too where no line is in its way.

    Raises:
        MissingRuntimeError: ai-edge-litert is not installed.
        PlanError: The program was planned without litert, or for images of any size.
    """
    _check_planned(program)
    speller = _Speller(program, ENGINES if engine is None else (engine,))
    data = speller.data()
    return Spelling(
        file_name=FILE_NAME,
        data=data,
        engine=speller.engines[0],
        arithmetics=tuple(f"litert/{name}" for name in speller.engines),
        payload_bytes=speller.writer.payload_bytes,
        runtime_ops=Counter(speller.writer.operators),
        taps=taps_of(program, speller.writer, data),
        unseen=speller.unseen,
    )


def _check_planned(program: QuantizedProgram) -> None:
    for name in program.inputs:
        found = [size for size in program.values[name].shape if isinstance(size, str) and size != BATCH_DIM]
        if found:
            raise PlanError(
                f"input {name!r} has a dynamic {' and '.join(found)}, but a file for litert has one size: prepare "
                "without dynamic_size, or lower to onnxruntime"
            )
    for op in program.ops:
        problem = None
        if op.kind is Kind.LINEAR and program.values[op.name].grid is None:
            problem = f"{op.name} gives float logits"
        elif op.kind is Kind.AVERAGE_POOL and program.grid_of(op.name) is not program.grid_of(op.inputs[0]):
            problem = f"{op.name} does not keep its input's grid"
        if problem is not None:
            raise PlanError(
                f"the program was not planned for litert ({problem}); name it among the targets of prepare"
            )


def taps_of(program: QuantizedProgram, writer: Writer, data: bytes) -> bytes:
    """How the values with a grid become outputs of the very file: JSON.

    A FlatBuffer's table refers to its list of outputs by an offset forwards, so a longer list at the file's end takes
    the place of the first by a change of four bytes.
    """
    graph = import_schema().Model.GetRootAs(data, 0).Subgraphs(0)
    at = graph._tab.Pos + graph._tab.Offset(OUTPUTS_SLOT)
    names = [name for name in program.tapped() if name in writer.stored]
    indices = [writer.stored[name].index for name in names]
    listed = [*graph.OutputsAsNumpy().tolist(), *dict.fromkeys(indices)]
    start = -(-len(data) // 4) * 4
    appended = bytes(start - len(data)) + struct.pack(f"<I{len(listed)}i", len(listed), *listed)
    first = graph.OutputsLength()
    at_output = {index: first + i for i, index in enumerate(dict.fromkeys(indices))}
    stored = [writer.stored[name] for name in names]
    rows = [[name, at_output[s.index], list(s.order)] for name, s in zip(names, stored, strict=True)]
    return json.dumps({"at": at, "offset": start - at, "append": appended.hex(), "values": rows}).encode()


class _Speller:
    """Writes the ops of a program in order.

    Attributes:
        engines: Those of the wanted ones that compute the program exactly.
    """

    def __init__(self, program: QuantizedProgram, engines: Sequence[str]) -> None:
        self.program, self.writer, self.islands = program, Writer(program), Islands(program)
        self.kernels, self.engines = kernels_of(program, engines)
        reads = Counter(name for op in program.ops for name in op.inputs)
        reads.update(program.outputs)
        self.shortcuts = {
            name: found
            for name, found in find_shortcuts(program.ops).items()
            if all(reads[inside] == 1 for inside in found.inside)
        }
        self.unseen = frozenset(name for found in self.shortcuts.values() for name in found.inside)

    def data(self) -> bytes:
        for name in self.program.inputs:
            self.writer.make(name, range(len(self.program.values[name].shape)))
            if self.program.values[name].grid is not None:
                self.writer.take_pixels(name)
        for op in self.program.ops:
            self._op(op)
        return self.writer.model()

    def _op(self, op: Op) -> None:
        w = self.writer
        if op.name in self.unseen:
            return
        if op.name in self.shortcuts:
            shortcut(w, op, self.shortcuts[op.name])
        elif op.kind is Kind.QUANTIZE or op.kind is Kind.DEQUANTIZE:
            rank = range(len(self.program.values[op.name].shape))
            w.op(op.kind.name, [w.plain(op.inputs[0])], [w.make(op.name, rank)])
        elif op.kind is Kind.FLOAT:
            self.islands.inline(w, op)
        elif op.kind is Kind.CONSTANT:
            self._constant(op)
        elif op.kind is Kind.CONV:
            convolution(w, op)
        elif op.kind is Kind.LINEAR:
            linear(w, op)
        elif op.kind in (Kind.ADD, Kind.MUL):
            self._combine(op)
        elif isinstance(op.attrs, ConcatAttrs):
            self._concat(op, op.attrs)
        elif isinstance(op.attrs, AveragePoolAttrs):
            self._average_pool(op, op.attrs)
        elif op.kind is Kind.LOOKUP:
            look_up(w, op, self.kernels.get(op.name))
        else:
            move(w, op)

    def _constant(self, op: Op) -> None:
        data, grid = self.program.consts[op.name].data, self.program.grid_of(op.name)
        assert data is not None
        index = self.writer.activations(data.numpy(), grid)
        self.writer.stored[op.name] = Stored(index, tuple(range(data.dim())), data.numpy())

    def _combine(self, op: Op) -> None:
        """A sum or product, in the order of dimensions of the first value that has all of them."""
        w, values = self.writer, self.program.values
        rank = len(values[op.name].shape)
        whole = [name for name in op.inputs if len(values[name].shape) == rank]
        order = next((w.stored[n].order for n in whole if w.stored[n].data is None), tuple(range(rank)))
        inputs = [w.ordered(name, order) if name in whole else self._wider(name, order) for name in op.inputs]
        w.op(op.kind.name, inputs, [w.make(op.name, order)])

    def _wider(self, name: str, order: Sequence[int]) -> int:
        """A value of fewer dimensions, with those that it lacks, of size 1, in front."""
        w, shape = self.writer, self.program.values[name].shape
        full = (1,) * (len(order) - len(shape)) + tuple(shape)
        found, grid = w.stored[name], self.program.grid_of(name)
        if found.data is not None:
            plain = found.data.transpose(np.argsort(found.order))
            return w.activations(plain.reshape(sizes_of(full)).transpose(order), grid)
        wider = w.tensor(full, grid)
        w.op("RESHAPE", [w.plain(name), w.ints(*sizes_of(full))], [wider])
        if tuple(order) == tuple(range(len(order))):
            return wider
        turned = w.tensor([full[dim] for dim in order], grid)
        w.op("TRANSPOSE", [wider, w.ints(*order)], [turned])
        return turned

    def _concat(self, op: Op, attrs: ConcatAttrs) -> None:
        w, grid = self.writer, self.program.grid_of(op.name)
        order = w.stored[op.inputs[0]].order
        inputs: list[int] = []
        for name in op.inputs:
            x = w.ordered(name, order)
            if self.program.grid_of(name) is not grid:
                changed = w.tensor(w.shape_in(name, order), grid)
                w.op("MUL", [x, w.activations(np.array(1), ONE)], [changed])
                x = changed
            inputs.append(x)
        w.op("CONCATENATION", inputs, [w.make(op.name, order)], {"axis": order.index(attrs.dim % len(order))})

    def _average_pool(self, op: Op, a: AveragePoolAttrs) -> None:
        w, name, order = self.writer, op.inputs[0], CHANNELS_LAST[4]
        x, shape, out = w.ordered(name, order), w.shape_in(name, order), w.shape_in(op.name, order)
        if a.kernel is None:
            w.op("MEAN", [x, w.ints(1, 2)], [w.make(op.name, order)], {"keepDims": True})
            return
        sides = [(pad, pad) for pad in a.padding]
        ones = (1, 1)
        x, padding = pad_for(w, name, x, shape, out, a.kernel, a.stride, ones, sides, counted=True)
        options: dict[str, Any] = {"padding": padding, "strideH": a.stride[0], "strideW": a.stride[1]}
        options |= {"filterHeight": a.kernel[0], "filterWidth": a.kernel[1]}
        w.op("AVERAGE_POOL_2D", [x], [w.make(op.name, order)], options)
