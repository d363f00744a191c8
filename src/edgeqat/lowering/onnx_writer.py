"""Writing an ONNX graph: nodes and initializers in program order, grids as 0-d constants, each constant once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from torch import Tensor

from edgeqat.errors import EdgeqatError, MissingRuntimeError
from edgeqat.program import Const, Grid, Op, QuantizedProgram

if TYPE_CHECKING:
    import onnx

__all__ = ["IR_VERSION", "OPSET", "WORTH_PACKING", "Writer", "import_onnx", "pack_nibbles"]

Attributes: TypeAlias = Mapping[str, Any]
NONE: Attributes = MappingProxyType({})

OPSET, IR_VERSION = 18, 8
PACKED_OPSET, PACKED_IR_VERSION = 21, 10
"""Of a file with INT4 tensors: the first that has them, so that all others load in older runtimes."""

PACKED_MAX = 7
"""Largest weight of 4 bits."""

WORTH_PACKING = 128
"""Elements from which half of their bytes is more than the Cast node takes that unpacks them."""

STORED_MAX = 255
INT8_SHIFT = 128


def import_onnx() -> Any:
    """The onnx package with what it does not import by itself.

    Raises:
        MissingRuntimeError: It is not installed.
    """
    try:
        import onnx
        import onnx.checker
        import onnx.helper
        import onnx.numpy_helper
    except ImportError as error:
        raise MissingRuntimeError("onnxruntime", "onnxruntime", str(error)) from error
    return onnx


class Writer:
    """Collects the nodes and initializers of one program's graph.

    Attributes:
        nodes: In order.
        initializers: By name.
        storage: "uint8" or "int8": how activations are stored.
        packs: Whether weights of up to 4 bits are stored in 4.
        weights: The dequantized weights there are already, so that a weight used twice is stored once.
    """

    def __init__(self, program: QuantizedProgram, storage: str = "uint8", packs: bool = False) -> None:
        self.onnx = import_onnx()
        self.program, self.storage, self.packs = program, storage, packs
        self.nodes: list[Any] = []
        self.initializers: dict[str, Any] = {}
        self.weights: dict[str, str] = {}
        self._grids: dict[int, tuple[str, str]] = {}
        self._dequantized: dict[str, str] = {}
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._counter = 0

    @property
    def opset(self) -> int:
        """The opset of the file."""
        return PACKED_OPSET if any(self.packed(const) for const in self.program.consts.values()) else OPSET

    def packed(self, const: Const) -> bool:
        """Whether the integers of a weight are stored in 4 bits."""
        assert const.data is not None
        # Only weights have integers below zero.
        return self.packs and -PACKED_MAX <= const.grid.qmin < 0 and const.data.numel() >= WORTH_PACKING

    def model(self) -> onnx.ModelProto:
        """The model of what was written."""
        helper = self.onnx.helper
        graph = helper.make_graph(
            self.nodes,
            "edgeqat",
            [self._info(name) for name in self.program.inputs],
            [self._info(name) for name in self.program.outputs],
            list(self.initializers.values()),
        )
        opset = [helper.make_opsetid("", self.opset)]
        version = IR_VERSION if self.opset == OPSET else PACKED_IR_VERSION
        model: onnx.ModelProto = helper.make_model(graph, opset_imports=opset, ir_version=version)
        return model

    def _info(self, name: str) -> Any:
        value = self.program.values[name]
        dtype = np.dtype(str(value.dtype).removeprefix("torch."))
        code = self.onnx.helper.np_dtype_to_tensor_dtype(dtype)
        return self.onnx.helper.make_tensor_value_info(name, code, value.shape)

    def node(self, op_type: str, inputs: Sequence[str], output: str, attributes: Attributes = NONE) -> None:
        """Adds a node with one output."""
        self.nodes.append(self.onnx.helper.make_node(op_type, list(inputs), [output], **dict(attributes)))

    def result(self, prefix: str, op_type: str, inputs: Sequence[str], attributes: Attributes = NONE) -> str:
        """Adds a node and returns the new name of its output."""
        name = self.fresh(prefix)
        self.node(op_type, inputs, name, attributes)
        return name

    def computed(
        self, op: Op, op_type: str, inputs: Sequence[str], attributes: Attributes = NONE, name: str | None = None
    ) -> None:
        """Adds op_type over float inputs, and the QuantizeLinear behind it where the op's value has a grid."""
        made = op.name if name is None else name
        if self.program.values[op.name].grid is None:
            self.node(op_type, inputs, made, attributes)
            return
        self.quantize(self.result("f", op_type, inputs, attributes), op.name, made)

    def quantize(self, floats: str, like: str, made: str) -> None:
        """Adds what brings a float tensor to the grid of the value `like`: a Clip where it ends before its storage."""
        grid = self.program.grid_of(like)
        if grid.qmax == STORED_MAX:
            self.node("QuantizeLinear", [floats, *self.grid(like)], made)
            return
        self.clip(self.result("q", "QuantizeLinear", [floats, *self.grid(like)]), grid, made)

    def clip(self, wide: str, grid: Grid, made: str) -> None:
        """Adds what clamps stored integers to the end of a grid."""
        self.node("Clip", [wide, "", self.constant(self.stored(np.asarray(grid.qmax)))], made)

    def dequantize(self, name: str) -> str:
        """The float tensor of a value: itself, or what one DequantizeLinear makes of it for all its consumers."""
        return name if self.program.values[name].grid is None else self.dequantize_once(name, name, name)

    def dequantize_once(self, key: str, tensor: str, like: str) -> str:
        """The float tensor of integers on the grid of the value `like`, made once for each key."""
        if key not in self._dequantized:
            self._dequantized[key] = self.result("d", "DequantizeLinear", [tensor, *self.grid(like)])
        return self._dequantized[key]

    def grid(self, name: str) -> tuple[str, str]:
        """The initializers of a value's scale and zero point, 0-d, which ONNX Runtime's fusions need."""
        grid = self.program.grid_of(name)
        if id(grid) not in self._grids:
            scale, zero_point = grid.filled()
            self._grids[id(grid)] = (self.constant(scalar(scale)), self.constant(self._zero_point(grid, zero_point)))
        return self._grids[id(grid)]

    def _zero_point(self, grid: Grid, zero_point: Tensor) -> np.ndarray[Any, Any]:
        """A zero point as it is stored, 0-d.

        Raises:
            EdgeqatError: The grid's integers do not fit uint8.
        """
        if grid.qmin != 0 or grid.qmax > STORED_MAX:
            raise EdgeqatError(f"found the activation grid {grid.qmin}..{grid.qmax}, wanted one that uint8 stores")
        return self.stored(np.asarray(int(zero_point)))

    def stored(self, integers: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Integers 0..255 of activations in the type they are stored in: int8 ones are 128 less."""
        if self.storage == "uint8":
            return np.asarray(integers, np.uint8)
        return np.asarray(integers.astype(np.int16) - INT8_SHIFT, np.int8)

    def fresh(self, prefix: str) -> str:
        """A new name."""
        # No module name holds a "#", so these never meet the name of a value or parameter.
        self._counter += 1
        return f"#{prefix}{self._counter}"

    def constant(self, array: np.ndarray[Any, Any]) -> str:
        """An initializer for `array`, shared with every equal one."""
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = self.initializer(self.fresh("c"), array)
        return self._constants[key]

    def integers(self, *values: int) -> str:
        """A 1-d int64 initializer."""
        return self.constant(np.array(values, np.int64))

    def own_name(self, wanted: str) -> str:
        """`wanted`, or a new name where something has that name."""
        taken = wanted in self.program.values or wanted in self.initializers
        return self.fresh(wanted) if taken else wanted

    def initializer(self, name: str, array: np.ndarray[Any, Any]) -> str:
        """Adds an initializer and returns its name."""
        self.initializers[name] = self.onnx.numpy_helper.from_array(array, name)
        return name

    def weight(self, name: str, const: Const, data: Tensor) -> str:
        """Adds the int8 integers of a weight, in 4 bits where they are packed; the name of the int8 tensor.

        ONNX Runtime unpacks them once, when it loads the file; a DequantizeLinear of the INT4 tensor itself would
        leave the layer in float.
        """
        if not self.packed(const):
            return self.initializer(name, data.numpy())
        proto = self.onnx.TensorProto
        self.initializers[name] = proto(
            name=name, data_type=proto.INT4, dims=data.shape, raw_data=pack_nibbles(data.numpy())
        )
        return self.result("w", "Cast", [name], {"to": proto.INT8})


def pack_nibbles(integers: np.ndarray[Any, Any]) -> bytes:
    """Integers -8..7, two to a byte, the first in the lower half; an odd count ends with a zero."""
    low = np.pad(integers.reshape(-1), (0, integers.size % 2)).astype(np.uint8) & 0xF
    return bytes(low[::2] | low[1::2] << 4)


def scalar(scale: Tensor) -> np.ndarray[Any, Any]:
    """A 0-d float32 array."""
    # np.asarray keeps it 0-d.
    return np.asarray(scale.numpy(), dtype=np.float32)
