"""Float islands in LiteRT: litert_torch converts them, and their ops and constants become part of the file's graph.

litert_torch fixes the batch. So every island is converted for two batches, and what differs between the two is the
batch: it is left open. An op that cannot leave it open is refused.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgeqat.errors import EdgeqatError, MissingRuntimeError
from edgeqat.interpreter.arithmetic.litert import LiteRTXnnpack
from edgeqat.interpreter.run import Interpreter
from edgeqat.lowering.float_shortcut import with_shortcut_convs
from edgeqat.lowering.litert_writer import Array, Stored, Writer
from edgeqat.program import Kind, Op, QuantizedProgram

__all__ = ["Islands"]

BATCHES = (2, 3)
"""Not 1, of which a converter may think that it is always 1."""

RESHAPES = {"RESHAPE": 1, "SLICE": 2}
"""Ops that take -1 for an open size, and which of their inputs has it."""

BROADCASTING = frozenset({"ADD", "SUB", "MUL", "DIV", "MAXIMUM", "MINIMUM", "SQUARED_DIFFERENCE"})
"""Ops whose operands may differ in shape."""

STRIDED_SLICE_END = 2
"""Which input of STRIDED_SLICE says where it ends."""


class Islands:
    """The float ops of a program. They are converted together when the first is asked for."""

    def __init__(self, program: QuantizedProgram) -> None:
        self._program = program
        self._ops = [op for op in program.ops if op.kind is Kind.FLOAT]
        self._models: list[Any] = []

    def inline(self, writer: Writer, op: Op) -> None:
        """Adds the ops of a float op.

        Raises:
            MissingRuntimeError: litert-torch is not installed.
            EdgeqatError: litert_torch cannot convert it, or only for one batch.
        """
        if not self._models:
            self._models = [self._convert(writer.schema, n) for n in BATCHES]
        _Merge(writer, op, *(_part(model, self._key(op)) for model in self._models)).run()

    def _key(self, op: Op) -> str:
        return f"island{self._ops.index(op)}"

    def _convert(self, schema: Any, batch: int) -> Any:
        """One model with a subgraph for each island."""
        try:
            with _quiet():
                import litert_torch
        except ImportError as error:
            raise MissingRuntimeError("litert", "litert", str(error)) from error
        sizes, call = _examples(self._program, batch), litert_torch
        for op in self._ops:
            assert op.body is not None
            call = call.signature(
                self._key(op), with_shortcut_convs(op.body), tuple(sizes[name] for name in op.inputs)
            )
        try:
            with _quiet():
                data = call.convert().model_content()
        except Exception as error:
            # The converter raises whatever it stumbles over; the user needs to know which ops.
            names = ", ".join(sorted({o.aten for op in self._ops for o in op.origins}))
            reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise EdgeqatError(
                f"LiteRT cannot hold one of the float ops {names}: litert_torch says {reason}; rewrite it, or lower "
                "to onnxruntime"
            ) from error
        return schema.ModelT.InitFromObj(schema.Model.GetRootAs(data, 0))


def _examples(program: QuantizedProgram, batch: int) -> dict[str, Tensor]:
    """A tensor of the right size and type for every value, for inputs of zeros."""
    env: dict[str, Tensor] = {}
    for name in program.inputs:
        value = program.values[name]
        env[name] = torch.zeros([batch, *(int(size) for size in value.shape[1:])], dtype=value.dtype)
    if len(program.ops) == 1:  # one island, the FP32 model: its inputs are all that is wanted
        return env
    interpreter = Interpreter(program, LiteRTXnnpack())
    for op in program.ops:
        found = interpreter.run_op(op, [env[name] for name in op.inputs])
        env.update(zip(op.outputs, found, strict=True))
    return env


def _part(model: Any, key: str) -> tuple[Any, Any]:
    """(model, subgraph) of one island."""
    for signature in model.signatureDefs:
        if signature.signatureKey.decode() == key:
            return model, model.subgraphs[signature.subgraphIndex]
    raise EdgeqatError(f"litert_torch left out {key}")


def _constants(model: Any, graph: Any) -> list[Array | None]:
    """The bytes of each tensor of a subgraph that is constant."""
    found = [model.buffers[tensor.buffer].data for tensor in graph.tensors]
    return [None if data is None or len(data) == 0 else np.asarray(data, np.uint8) for data in found]


class _Merge:
    """Copies the ops of one island, converted for two batches, into a writer."""

    def __init__(self, writer: Writer, op: Op, first: tuple[Any, Any], second: tuple[Any, Any]) -> None:
        self.writer, self.op = writer, op
        (self.model, self.graph), (_, self.other) = first, second
        self.constants, self.other_constants = _constants(*first), _constants(*second)
        self.numbers: dict[int, int] = {-1: -1}
        self.dropped = self._needless_broadcasts()

    def run(self) -> None:
        if len(self.graph.tensors) != len(self.other.tensors) or self._kinds(self.graph) != self._kinds(self.other):
            raise self._bound("its ops")
        for index, name in zip(self.graph.inputs, self.op.inputs, strict=True):
            self.numbers[int(index)] = self._cast_to(self.writer.plain(name), self.graph.tensors[index].type)
        for operator, other in zip(self.graph.operators, self.other.operators, strict=True):
            self._operator(operator, other)
        for index, name in zip(self.graph.outputs, self.op.outputs, strict=True):
            order = tuple(range(len(self.writer.program.values[name].shape)))
            wanted = self.writer.dtype_of(name)
            self.writer.stored[name] = Stored(self._cast_to(self._tensor(int(index)), wanted), order)

    def _cast_to(self, index: int, dtype: int) -> int:
        """A tensor in another type: the converter takes 64-bit integers for 32-bit ones."""
        return index if self.writer.type_of(index) == dtype else self.writer.cast(index, dtype)

    def _needless_broadcasts(self) -> set[int]:
        """Results of BROADCAST_TO, which takes no open size, that only ops read which would broadcast anyway."""
        graph, found = self.graph, set()
        for operator in graph.operators:
            if self._name(operator) == "BROADCAST_TO":
                index = int(operator.outputs[0])
                readers = [reader for reader in graph.operators if index in reader.inputs]
                if index not in graph.outputs and all(self._broadcasts(reader, index) for reader in readers):
                    found.add(index)
        return found

    def _broadcasts(self, reader: Any, index: int) -> bool:
        """Whether an op computes of a smaller tensor and its other one what it does of the result of BROADCAST_TO."""
        shape = tuple(self.graph.tensors[index].shape)
        others = [int(i) for i in reader.inputs if i != index]
        return (
            self._name(reader) in BROADCASTING
            and len(others) == 1
            and tuple(self.graph.tensors[others[0]].shape) == shape
        )

    def _name(self, operator: Any) -> str:
        code = self.model.operatorCodes[operator.opcodeIndex]
        return self.writer.op_name(max(code.builtinCode, code.deprecatedBuiltinCode))

    def _kinds(self, graph: Any) -> list[int]:
        return [operator.opcodeIndex for operator in graph.operators]

    def _operator(self, operator: Any, other: Any) -> None:
        code, name = self.model.operatorCodes[operator.opcodeIndex], self._name(operator)
        if int(operator.outputs[0]) in self.dropped:
            self.numbers[int(operator.outputs[0])] = self._tensor(int(operator.inputs[0]))
            return
        if name.startswith("STABLEHLO") or name in ("CALL", "IF", "WHILE"):
            raise EdgeqatError(f"{self._who()} become {name}, which has a graph of its own; lower to onnxruntime")
        inputs = []
        for position, (index, twin) in enumerate(zip(operator.inputs, other.inputs, strict=True)):
            found = self._opened(operator, name, position, int(index), int(twin))
            inputs.append(self._tensor(int(index)) if found is None else self.writer.constant(found))
        operator.inputs = np.array(inputs, np.int32)
        operator.outputs = np.array([self._tensor(int(index)) for index in operator.outputs], np.int32)
        if name == "RESHAPE":
            operator.builtinOptions, operator.builtinOptionsType = None, 0  # its input says the same
        builtin = max(code.builtinCode, code.deprecatedBuiltinCode)
        operator.opcodeIndex = self.writer.code(builtin, code.version, code.customCode or b"")
        self.writer.append(operator, name)

    def _opened(self, operator: Any, name: str, position: int, index: int, twin: int) -> Array | None:
        """A constant whose numbers depend on the batch, with the batch left open; None where they do not."""
        if index < 0:
            return None
        mine, theirs = self.constants[index], self.other_constants[twin]
        if mine is None or theirs is None or np.array_equal(mine, theirs):
            return None
        shape = tuple(self.graph.tensors[index].shape)
        if self.graph.tensors[index].type != self.writer.schema.TensorType.INT32 or len(mine) != len(theirs):
            raise self._bound(f"a constant of {name}")
        numbers, others = mine.view(np.int32), theirs.view(np.int32)
        differ = numbers != others
        if RESHAPES.get(name) == position and differ.sum() == 1:
            return np.where(differ, -1, numbers).astype(np.int32).reshape(shape)
        if name == "STRIDED_SLICE" and position == STRIDED_SLICE_END:
            operator.builtinOptions.endMask |= sum(1 << int(i) for i in np.flatnonzero(differ))
            return numbers.reshape(shape)
        raise self._bound(f"the sizes of {name}")

    def _tensor(self, index: int) -> int:
        if index not in self.numbers:
            tensor, data = self.graph.tensors[index], self.constants[index]
            sizes, others = np.array(tensor.shape), np.array(self.other.tensors[index].shape)
            if not np.array_equal(sizes, others):
                if data is not None:
                    raise self._bound("a constant")
                tensor.shapeSignature = np.where(sizes == others, sizes, -1).astype(np.int32)
                tensor.shape = np.where(sizes == others, sizes, sizes // BATCHES[0]).astype(np.int32)
            else:
                tensor.shape, tensor.shapeSignature = sizes.astype(np.int32), None
            tensor.name = b""
            if data is not None:
                self.writer.payload_bytes += len(data)
            self.numbers[index] = self.writer.adopt(tensor, data)
        return self.numbers[index]

    def _who(self) -> str:
        return f"the float ops {', '.join(sorted({o.aten for o in self.op.origins}))}"

    def _bound(self, what: str) -> EdgeqatError:
        return EdgeqatError(
            f"LiteRT can hold {self._who()} for one batch alone, because of {what}: write those that read the "
            "batch's size another way, such as with -1 in a view, or lower to onnxruntime"
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps what the converter prints, from C++ too, off standard output and error."""
    logging.disable(logging.WARNING)
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(1), os.dup(2)]
    try:
        with tempfile.TemporaryFile() as nowhere, contextlib.redirect_stdout(io.StringIO()):
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
            with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
    finally:
        for target, saved in zip((1, 2), kept, strict=True):
            os.dup2(saved, target)
            os.close(saved)
        logging.disable(logging.NOTSET)
