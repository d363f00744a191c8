"""Writing LiteRT's FlatBuffer: tensors, ops, constants, and the order of dimensions that each value is stored in.

A value may be stored with its dimensions in any order: images have their channels last, as the kernels want them, a
permutation only renames the dimensions, and a TRANSPOSE is written where an op needs another order than there is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgeqat.errors import MissingRuntimeError
from edgeqat.program import Grid, QuantizedProgram

__all__ = ["INT8_SHIFT", "Stored", "Writer", "import_schema"]

INT8_SHIFT = 128
"""Activations are stored 128 less, as int8."""

ALIGNMENT = 16
"""Bytes to which the format aligns constant data."""

Array = np.ndarray[Any, Any]
Shape = tuple[int | str, ...]

OPS = {
    # op: (version, class of its options or None). The versions are the lowest that take int8.
    "ADD": (2, "AddOptions"),
    "AVERAGE_POOL_2D": (2, "Pool2DOptions"),
    "BATCH_MATMUL": (2, "BatchMatMulOptions"),
    "CAST": (1, "CastOptions"),
    "CONCATENATION": (2, "ConcatenationOptions"),
    "CONV_2D": (3, "Conv2DOptions"),
    "DEPTHWISE_CONV_2D": (3, "DepthwiseConv2DOptions"),
    "DEQUANTIZE": (2, None),
    "ELU": (1, None),
    "FULLY_CONNECTED": (4, "FullyConnectedOptions"),
    "GATHER": (2, "GatherOptions"),
    "GELU": (2, "GeluOptions"),
    "LOGISTIC": (2, None),
    "MAXIMUM": (2, None),
    "MAX_POOL_2D": (2, "Pool2DOptions"),
    "MEAN": (2, "ReducerOptions"),
    "MUL": (2, "MulOptions"),
    "PAD": (2, None),
    "PADV2": (2, None),
    "QUANTIZE": (2, None),
    "RESHAPE": (1, None),
    "RESIZE_NEAREST_NEIGHBOR": (2, "ResizeNearestNeighborOptions"),
    "SLICE": (2, "SliceOptions"),
    "SPLIT": (2, "SplitOptions"),
    "STRIDED_SLICE": (2, "StridedSliceOptions"),
    "TANH": (2, None),
    "TRANSPOSE": (2, None),
    "TRANSPOSE_CONV": (3, "TransposeConvOptions"),
}


@dataclass(frozen=True)
class Stored:
    """A tensor of the file that holds a value.

    Attributes:
        index: Its number in the subgraph.
        order: Its dimension i is dimension order[i] of the value.
        data: Its elements, where it is constant.
    """

    index: int
    order: tuple[int, ...]
    data: Array | None = None


class Writer:
    """Collects the one subgraph of a model.

    Attributes:
        program: What is written.
        stored: By value: the tensor that holds it.
        pixels: By input: the uint8 tensor that is given in its place.
        operators: Names of the ops that were written, in order.
    """

    def __init__(self, program: QuantizedProgram) -> None:
        self.program, self.schema = program, import_schema()
        self.stored: dict[str, Stored] = {}
        self.pixels: dict[str, int] = {}
        self.operators: list[str] = []
        self.payload_bytes = 0
        self._tensors: list[Any] = []
        self._buffers: list[Any] = [self.schema.BufferT()]  # the first is that of tensors without data
        self._ops: list[Any] = []
        self._codes: dict[tuple[int, int, bytes], int] = {}
        self._constants: dict[Any, int] = {}
        self._ordered: dict[tuple[int, tuple[int, ...]], Stored] = {}

    # Tensors.

    def tensor(self, shape: Sequence[int | str], grid: Grid | None, name: str = "", dtype: str = "") -> int:
        """Adds a tensor; a size that is a name is open. int8 where it has a grid, else float32 or `dtype`."""
        sizes = [1 if isinstance(size, str) else size for size in shape]
        made = self._new(sizes, dtype or ("FLOAT32" if grid is None else "INT8"), name)
        if any(isinstance(size, str) for size in shape):
            made.shapeSignature = [-1 if isinstance(size, str) else size for size in shape]
        if grid is not None:
            scale, zero_point = grid.per_tensor()
            made.quantization = self.quantization([scale], [zero_point - INT8_SHIFT])
        return len(self._tensors) - 1

    def take_pixels(self, name: str) -> None:
        """Makes an input that has a grid a uint8 one; QUANTIZE takes 128 away, since the scales are the same."""
        value, grid = self.program.values[name], self.program.grid_of(name)
        self.pixels[name] = self.tensor(value.shape, grid, f"{name}:pixels")
        made = self._tensors[self.pixels[name]]
        scale, zero_point = grid.per_tensor()
        made.type, made.quantization = self.schema.TensorType.UINT8, self.quantization([scale], [zero_point])
        self.op("QUANTIZE", [self.pixels[name]], [self.stored[name].index])

    def constant(self, data: Array, quantization: Any = None) -> int:
        """A constant tensor; equal ones without a grid are one."""
        key = (data.dtype.str, data.shape, data.tobytes()) if quantization is None else None
        if key in self._constants:
            return self._constants[key]
        made = self._new(list(data.shape), DTYPES[data.dtype.name], "")
        made.quantization, made.buffer = quantization, len(self._buffers)
        self._buffers.append(_aligned_buffer(self.schema, data.reshape(-1).view(np.uint8)))
        if key is not None:
            self._constants[key] = len(self._tensors) - 1
        return len(self._tensors) - 1

    def ints(self, *values: int) -> int:
        """A constant int32 vector."""
        return self.constant(np.array(values, np.int32))

    def activations(self, data: Array, grid: Grid) -> int:
        """A constant of canonical integers of a grid."""
        scale, zero_point = grid.per_tensor()
        stored = (data.astype(np.int16) - INT8_SHIFT).astype(np.int8)
        return self.constant(stored, self.quantization([scale], [zero_point - INT8_SHIFT]))

    def quantization(self, scale: Any, zero_point: Any, dimension: int = 0) -> Any:
        """The format's record of a grid."""
        made = self.schema.QuantizationParametersT()
        made.scale, made.zeroPoint = np.asarray(scale, np.float32), np.asarray(zero_point, np.int64)
        made.quantizedDimension = dimension
        return made

    def adopt(self, tensor: Any, data: Array | None) -> int:
        """Adds a tensor of another model, with its constant data."""
        tensor.buffer = 0
        if data is not None and len(data):
            tensor.buffer = len(self._buffers)
            self._buffers.append(_aligned_buffer(self.schema, data))
        self._tensors.append(tensor)
        return len(self._tensors) - 1

    def dtype_of(self, name: str) -> int:
        """The number of a float value's type."""
        dtype = str(self.program.values[name].dtype).removeprefix("torch.")
        return int(getattr(self.schema.TensorType, DTYPES[dtype]))

    def type_of(self, index: int) -> int:
        """The number of a tensor's type."""
        return int(self._tensors[index].type)

    def cast(self, index: int, dtype: int) -> int:
        """A tensor's elements in another type."""
        source = self._tensors[index]
        made = self._new(list(source.shape), "FLOAT32", "")
        made.type, made.shapeSignature = dtype, source.shapeSignature
        result = len(self._tensors) - 1
        self.op("CAST", [index], [result])
        return result

    def _new(self, sizes: list[int], dtype: str, name: str) -> Any:
        made = self.schema.TensorT()
        made.shape, made.name, made.hasRank = np.array(sizes, np.int32), name, True
        made.type = getattr(self.schema.TensorType, dtype)
        self._tensors.append(made)
        return made

    # Ops.

    def op(
        self, name: str, inputs: Sequence[int], outputs: Sequence[int], options: Mapping[str, Any] | None = None
    ) -> None:
        """Adds an op; an input of -1 is left out."""
        version, kind = OPS[name]
        made = self.schema.OperatorT()
        made.opcodeIndex = self.code(getattr(self.schema.BuiltinOperator, name), version, b"")
        made.inputs, made.outputs = np.array(inputs, np.int32), np.array(outputs, np.int32)
        if kind is not None:
            made.builtinOptionsType = getattr(self.schema.BuiltinOptions, kind)
            made.builtinOptions = getattr(self.schema, f"{kind}T")()
            for key, value in (options or {}).items():
                assert hasattr(made.builtinOptions, key), (name, key)
                setattr(made.builtinOptions, key, value)
        self.append(made, name)

    def append(self, operator: Any, name: str) -> None:
        """Adds an op that is made already."""
        self._ops.append(operator)
        self.operators.append(name)

    def op_name(self, builtin: int) -> str:
        """The name of an op of the format."""
        return next(str(name) for name, number in vars(self.schema.BuiltinOperator).items() if number == builtin)

    def code(self, builtin: int, version: int, custom: bytes) -> int:
        """The number of an op's kind and version."""
        return self._codes.setdefault((builtin, version, custom), len(self._codes))

    # Values and the order of their dimensions.

    def shape_in(self, name: str, order: Sequence[int]) -> Shape:
        """A value's shape, its dimensions in that order."""
        shape = self.program.values[name].shape
        return tuple(shape[dim] for dim in order)

    def make(self, name: str, order: Sequence[int]) -> int:
        """Adds the tensor that holds a value."""
        value = self.program.values[name]
        dtype = "" if value.grid is not None else DTYPES[str(value.dtype).removeprefix("torch.")]
        index = self.tensor(self.shape_in(name, order), value.grid, name, dtype)
        self.stored[name] = Stored(index, tuple(order))
        return index

    def plain(self, name: str) -> int:
        """The tensor of a value with its dimensions in their own order."""
        return self.ordered(name, range(len(self.program.values[name].shape)))

    def ordered(self, name: str, order: Sequence[int]) -> int:
        """The tensor of a value with its dimensions in that order."""
        found, wanted = self.stored[name], tuple(order)
        if found.order == wanted:
            return found.index
        if (found.index, wanted) not in self._ordered:
            self._ordered[found.index, wanted] = self._reordered(name, found, wanted)
        return self._ordered[found.index, wanted].index

    def _reordered(self, name: str, found: Stored, order: tuple[int, ...]) -> Stored:
        dims = [found.order.index(dim) for dim in order]
        grid = self.program.values[name].grid
        if found.data is not None:
            assert grid is not None
            data = np.ascontiguousarray(found.data.transpose(dims))
            return Stored(self.activations(data, grid), order, data)
        shape = self.shape_in(name, order)
        index = self.tensor(shape, grid)
        # Where all that changes place has size 1, the elements stay where they are.
        moved = [dim for dim in dims if self.shape_in(name, found.order)[dim] != 1]
        if moved == sorted(moved):
            self.op("RESHAPE", [found.index, self.ints(*sizes_of(shape))], [index])
        else:
            self.op("TRANSPOSE", [found.index, self.ints(*dims)], [index])
        return Stored(index, order)

    # The file.

    def model(self) -> bytes:
        """The file's bytes."""
        import flatbuffers

        schema, program = self.schema, self.program
        inputs = [self.pixels.get(name, self.stored[name].index) for name in program.inputs]
        outputs = [self.plain(name) for name in program.outputs]
        graph = schema.SubGraphT()
        graph.tensors, graph.operators = self._tensors, self._ops
        graph.inputs, graph.outputs = np.array(inputs, np.int32), np.array(outputs, np.int32)
        model = schema.ModelT()
        model.version, model.subgraphs, model.buffers = 3, [graph], self._buffers
        model.operatorCodes = [self._code(*key) for key in self._codes]
        model.signatureDefs = [self._signature(inputs, outputs)]
        builder = flatbuffers.Builder(2**16)
        builder.Finish(model.Pack(builder), b"TFL3")
        return bytes(builder.Output())

    def _code(self, builtin: int, version: int, custom: bytes) -> Any:
        made = self.schema.OperatorCodeT()
        made.builtinCode, made.version = builtin, version
        made.deprecatedBuiltinCode = min(builtin, self.schema.BuiltinOperator.PLACEHOLDER_FOR_GREATER_OP_CODES)
        made.customCode = custom or None
        return made

    def _signature(self, inputs: Sequence[int], outputs: Sequence[int]) -> Any:
        made = self.schema.SignatureDefT()
        made.signatureKey, made.subgraphIndex = "serving_default", 0
        made.inputs = [self._named(*pair) for pair in zip(self.program.inputs, inputs, strict=True)]
        made.outputs = [self._named(*pair) for pair in zip(self.program.outputs, outputs, strict=True)]
        return made

    def _named(self, name: str, index: int) -> Any:
        made = self.schema.TensorMapT()
        made.name, made.tensorIndex = name, index
        return made


DTYPES = {
    "float32": "FLOAT32",
    "float16": "FLOAT16",
    "float64": "FLOAT64",
    "int8": "INT8",
    "uint8": "UINT8",
    "int16": "INT16",
    "int32": "INT32",
    "int64": "INT64",
    "bool": "BOOL",
}
"""Of numpy and torch: the format's name."""


def sizes_of(shape: Sequence[int | str]) -> list[int]:
    """The sizes that RESHAPE takes; -1 stands for the open one."""
    return [-1 if isinstance(size, str) else size for size in shape]


def import_schema() -> Any:
    """The format's classes.

    Raises:
        MissingRuntimeError: ai-edge-litert or flatbuffers is not installed.
    """
    try:
        import flatbuffers  # noqa: F401
        from ai_edge_litert import schema_py_generated
    except ImportError as error:
        raise MissingRuntimeError("litert", "litert", str(error)) from error
    return schema_py_generated


def _aligned_buffer(schema: Any, data: Array) -> Any:
    """A buffer whose bytes are aligned as the format asks for; the generated classes do not see to it."""

    class Aligned(schema.BufferT):  # type: ignore[misc]
        def Pack(self, builder: Any) -> Any:
            builder.StartVector(1, len(data), ALIGNMENT)
            builder.head -= len(data)
            builder.Bytes[builder.Head() : builder.Head() + len(data)] = data.tobytes()
            vector = builder.EndVector()
            schema.BufferStart(builder)
            schema.BufferAddData(builder, vector)
            return schema.BufferEnd(builder)

    return Aligned()
