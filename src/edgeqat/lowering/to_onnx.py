"""Spelling a quantized program in ONNX, the way ONNX Runtime's integer kernels want it.

Every value with a grid is a uint8 tensor under its own name. What computes is written DequantizeLinear -> op ->
QuantizeLinear, which ONNX Runtime fuses into one integer kernel; what only moves integers (reshape, transpose,
slice, pad, max pool) acts on the uint8 tensor itself, so nothing depends on an optimiser there. Facts this relies
on, each measured:

- scale and zero point of a per-tensor grid are 0-d: shape [1] silently blocks the fusion of additions;
- biases are int32 behind a DequantizeLinear: float ones leave the layer in float;
- global pooling is GlobalAveragePool: ReduceMean stays float;
- an activation function is the clamp of QuantizeLinear: no Relu node.

Names of scales and intermediate tensors are short, because in a small model they are a visible part of the file.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from edgeqat.errors import EdgeqatError, MissingRuntimeError
from edgeqat.lowering.onnx_island import Islands
from edgeqat.lowering.onnx_session import optimized_ops
from edgeqat.lowering.spelling import Spelling
from edgeqat.program import (
    AveragePoolAttrs,
    Const,
    ConvAttrs,
    Grid,
    Kind,
    MaxPoolAttrs,
    Op,
    PadAttrs,
    PermuteAttrs,
    QuantizedProgram,
    SliceAttrs,
    ViewAttrs,
)

if TYPE_CHECKING:
    import onnx

__all__ = ["OPSET", "payload_bytes", "spell", "spell_model", "taps_suffix"]

OPSET = 18
IR_VERSION = 8

ORT_QUANTIZES = frozenset({"Conv", "ConvTranspose", "Gemm"})
"""Float layers whose weights ONNX Runtime quantizes by itself where they stand between integers."""

ORT_SEES_THROUGH = frozenset(
    {"Dropout", "Identity", "MaxPool", "Pad", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"}
)
"""Ops that its optimiser removes, merges into the layer, or behind which it moves the DequantizeLinear before them."""

INT32_MAX = 2**31 - 1
"""Where a slice ends that runs to the end."""


def spell(program: QuantizedProgram, engine: str | None) -> Spelling:
    """The ONNX file of a program; `engine` is of no meaning here.

    Raises:
        MissingRuntimeError: onnx or onnxruntime is not installed.
    """
    model = spell_model(program)
    data: bytes = model.SerializeToString(deterministic=True)
    return Spelling(
        file_name="model.onnx",
        data=data,
        engine="CPUExecutionProvider",
        arithmetics=("onnxruntime/x86",),
        payload_bytes=payload_bytes(model),
        runtime_ops=optimized_ops(data),
        taps=taps_suffix(program),
    )


def spell_model(program: QuantizedProgram) -> onnx.ModelProto:
    """The ONNX model of a program: QDQ form, dynamic batch, no metadata; passes onnx.checker.

    Raises:
        MissingRuntimeError: onnx is not installed.
    """
    onnx = _onnx()
    model = _Speller(program).model()
    onnx.checker.check_model(model, full_check=True)
    return model


def taps_suffix(program: QuantizedProgram) -> bytes:
    """Bytes that, appended to the model file, make every value with a grid an output.

    Concatenating serialised protobuf messages merges them, so a device with nothing but the runtime can look
    inside the very file it runs.
    """
    onnx = _onnx()
    names = [v.name for v in program.values.values() if v.grid is not None]
    outputs = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.UINT8, None) for n in names]
    suffix: bytes = onnx.ModelProto(graph=onnx.GraphProto(output=outputs)).SerializeToString()
    return suffix


def payload_bytes(model: onnx.ModelProto) -> int:
    """Bytes of weights and biases alone: initializers that are neither scale nor zero point nor a shape."""
    onnx = _onnx()
    parameters = {
        i for node in model.graph.node for i in node.input[1:3] if node.op_type in ("Conv", "Gemm", "MatMul")
    }
    through = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    wanted = {through.get(name, name) for name in parameters}
    return sum(onnx.numpy_helper.to_array(t).nbytes for t in model.graph.initializer if t.name in wanted)


def _onnx() -> Any:
    try:
        import onnx
        import onnx.checker
        import onnx.helper
        import onnx.numpy_helper
    except ImportError as error:
        raise MissingRuntimeError("onnxruntime", "onnxruntime", str(error)) from error
    return onnx


class _Speller:
    """Writes nodes and initializers in program order."""

    def __init__(self, program: QuantizedProgram) -> None:
        self.onnx = _onnx()
        self.program = program
        self.islands = Islands(program, OPSET)
        self.nodes: list[Any] = []
        self.initializers: dict[str, Any] = {}
        self.grids: dict[int, tuple[str, str]] = {}
        self.dequantized: dict[str, str] = {}
        self.floats_of_integers = {op.name for op in program.ops if op.kind is Kind.DEQUANTIZE}
        self.constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self.counter = 0

    def model(self) -> onnx.ModelProto:
        for op in self.program.ops:
            self._op(op)
        helper = self.onnx.helper
        graph = helper.make_graph(
            self.nodes,
            "edgeqat",
            [self._info(name) for name in self.program.inputs],
            [self._info(name) for name in self.program.outputs],
            list(self.initializers.values()),
        )
        opset = [helper.make_opsetid("", OPSET)]
        model: onnx.ModelProto = helper.make_model(graph, opset_imports=opset, ir_version=IR_VERSION)
        return model

    def _info(self, name: str) -> Any:
        value = self.program.values[name]
        dtype = np.dtype(str(value.dtype).removeprefix("torch."))
        code = self.onnx.helper.np_dtype_to_tensor_dtype(dtype)
        return self.onnx.helper.make_tensor_value_info(name, code, value.shape)

    def _op(self, op: Op) -> None:
        if op.kind is Kind.FLOAT:
            nodes, initializers = self.islands.inline(op, self._fresh("i"))
            self._float_island(op, nodes)
            self.initializers |= {t.name: t for t in initializers}
        elif op.kind is Kind.QUANTIZE:
            self._quantize(op.inputs[0], op.name)
        elif op.kind is Kind.DEQUANTIZE:
            self._node("DequantizeLinear", [op.inputs[0], *self._grid(op.inputs[0])], op.name)
        elif op.kind in (Kind.CONV, Kind.LINEAR):
            self._weighted(op)
        elif op.kind is Kind.ADD:
            self._computed(op, "Add", [self._dequantize(name) for name in op.inputs])
        elif op.kind is Kind.AVERAGE_POOL:
            self._average_pool(op)
        else:
            self._move(op)

    def _float_island(self, op: Op, nodes: Sequence[Any]) -> None:
        """Adds an island's nodes, guarding layers over dequantized values: ONNX Runtime would quantize their weights.

        It takes every Conv, ConvTranspose and Gemm between a DequantizeLinear and a QuantizeLinear for a quantized
        layer whose weights were forgotten. A Clip at the lowest float changes nothing and keeps them apart.
        """
        dequantized = self.floats_of_integers.intersection(op.inputs)
        for node in nodes:
            if node.op_type in ORT_QUANTIZES and node.input[0] in dequantized:
                guarded = self._fresh("g")
                lowest = self._constant(np.asarray(np.finfo(np.float32).min, np.float32))
                self._node("Clip", [node.input[0], lowest], guarded)
                node.input[0] = guarded
            elif node.op_type in ORT_SEES_THROUGH and node.input[0] in dequantized:
                dequantized.update(node.output)
            self.nodes.append(node)

    # Computing ops: DequantizeLinear -> op -> QuantizeLinear.

    def _weighted(self, op: Op) -> None:
        assert op.weight is not None
        const, short = self.program.consts[op.weight], self._fresh("w")
        inputs = [self._dequantize(op.inputs[0]), self._weight(const, short)]
        if op.bias is not None:
            inputs.append(self._bias(op, const, short))
        if not isinstance(op.attrs, ConvAttrs):
            self._computed(op, "Gemm", inputs, transB=1)
            return
        a = op.attrs
        assert const.data is not None
        self._computed(
            op,
            "Conv",
            inputs,
            kernel_shape=list(const.data.shape[2:]),
            strides=list(a.stride),
            pads=[before for before, _ in a.padding] + [after for _, after in a.padding],
            dilations=list(a.dilation),
            group=a.groups,
        )

    def _weight(self, const: Const, short: str) -> str:
        assert const.data is not None
        if const.source in self.dequantized:
            return self.dequantized[const.source]
        scale, zero_point = const.grid.filled()
        name, result = self._own_name(const.source), f"{short}d"
        self._initializer(name, const.data.numpy())
        self._initializer(f"{short}s", scale.numpy())
        zero = self._constant(zero_point.numpy().astype(np.int8))
        # Without a channel axis the attribute has no meaning, and an optimiser may stumble over it.
        axis = {} if const.grid.axis is None else {"axis": const.grid.axis}
        self._node("DequantizeLinear", [name, f"{short}s", zero], result, **axis)
        self.dequantized[const.source] = result
        return result

    def _bias(self, op: Op, const: Const, short: str) -> str:
        assert op.bias is not None
        input_scale, _ = self.program.grid_of(op.inputs[0]).filled()
        weight_scale, _ = const.grid.filled()
        name, result = self._own_name(f"{op.name}:bias"), f"{short}e"
        self._initializer(name, op.bias.numpy())
        scale = input_scale * weight_scale
        self._initializer(f"{short}t", scale.numpy())
        self._node("DequantizeLinear", [name, f"{short}t"], result, **({"axis": 0} if scale.dim() else {}))
        return result

    def _average_pool(self, op: Op) -> None:
        a = op.attrs
        assert isinstance(a, AveragePoolAttrs)
        inputs = [self._dequantize(op.inputs[0])]
        if a.kernel is None:
            self._computed(op, "GlobalAveragePool", inputs)
            return
        self._computed(
            op,
            "AveragePool",
            inputs,
            kernel_shape=list(a.kernel),
            strides=list(a.stride),
            pads=list(a.padding) * 2,
            count_include_pad=int(a.count_include_pad),
        )

    def _computed(self, op: Op, op_type: str, inputs: Sequence[str], **attributes: Any) -> None:
        if self.program.values[op.name].grid is None:
            self._node(op_type, inputs, op.name, **attributes)
            return
        result = self._fresh("f")
        self._node(op_type, inputs, result, **attributes)
        self._quantize(result, op.name)

    # Passthrough ops: on the integers themselves.

    def _move(self, op: Op) -> None:
        a, x = op.attrs, op.inputs[0]
        if isinstance(a, MaxPoolAttrs):
            pool = {"kernel_shape": list(a.kernel), "strides": list(a.stride), "dilations": list(a.dilation)}
            self._node("MaxPool", [x], op.name, pads=list(a.padding) * 2, ceil_mode=int(a.ceil_mode), **pool)
        elif isinstance(a, ViewAttrs):
            self._node("Reshape", [x, self._constant(np.array(a.shape, np.int64))], op.name)
        elif isinstance(a, PermuteAttrs):
            self._node("Transpose", [x], op.name, perm=list(a.dims))
        elif isinstance(a, SliceAttrs):
            stop = INT32_MAX if a.stop is None else a.stop
            bounds = [self._constant(np.array([v], np.int64)) for v in (a.start, stop, a.dim, a.step)]
            self._node("Slice", [x, *bounds], op.name)
        elif isinstance(a, PadAttrs):
            self._pad(x, op.name, a)
        else:
            raise EdgeqatError(f"{op.name}: no ONNX spelling for kind {op.kind.value}")

    def _pad(self, x: str, name: str, a: PadAttrs) -> None:
        if a.mode == "circular":
            self._wrap(x, name, a)
            return
        pads = self._constant(np.array([side for sides in zip(*a.padding, strict=True) for side in sides], np.int64))
        if a.mode == "constant":
            self._node("Pad", [x, pads, self._grid(x)[1]], name)
        else:
            self._node("Pad", [x, pads], name, mode={"reflect": "reflect", "replicate": "edge"}[a.mode])

    def _wrap(self, x: str, name: str, a: PadAttrs) -> None:
        """Circular padding, a dimension at a time: Pad's own mode for it came with a later opset."""
        dims = [dim for dim, sides in enumerate(a.padding) if any(sides)]
        for dim in dims:
            before, after = a.padding[dim]
            head = [self._cut(x, dim, -before, INT32_MAX)] if before else []
            tail = [self._cut(x, dim, 0, after)] if after else []
            result = name if dim == dims[-1] else self._fresh("p")
            self._node("Concat", [*head, x, *tail], result, axis=dim)
            x = result

    def _cut(self, x: str, dim: int, start: int, stop: int) -> str:
        result = self._fresh("s")
        bounds = [self._constant(np.array([v], np.int64)) for v in (start, stop, dim)]
        self._node("Slice", [x, *bounds], result)
        return result

    # Grids.

    def _quantize(self, source: str, name: str) -> None:
        self._node("QuantizeLinear", [source, *self._grid(name)], name)

    def _dequantize(self, name: str) -> str:
        """The float tensor of a gridded value; one DequantizeLinear serves all its consumers."""
        if name not in self.dequantized:
            result = self._fresh("d")
            self._node("DequantizeLinear", [name, *self._grid(name)], result)
            self.dequantized[name] = result
        return self.dequantized[name]

    def _grid(self, name: str) -> tuple[str, str]:
        grid = self.program.grid_of(name)
        if id(grid) not in self.grids:
            scale, zero_point = grid.filled()
            self.grids[id(grid)] = (
                self._constant(_scalar(scale)),
                self._constant(_storage(grid, zero_point)),
            )
        return self.grids[id(grid)]

    # Primitives.

    def _fresh(self, prefix: str) -> str:
        # No module name holds a "#", so these never meet the name of a value or parameter.
        self.counter += 1
        return f"#{prefix}{self.counter}"

    def _constant(self, array: np.ndarray[Any, Any]) -> str:
        """An initializer for `array`, shared with every equal one."""
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self.constants:
            self.constants[key] = self._initializer(self._fresh("c"), array)
        return self.constants[key]

    def _own_name(self, wanted: str) -> str:
        taken = wanted in self.program.values or wanted in self.initializers
        return self._fresh(wanted) if taken else wanted

    def _initializer(self, name: str, array: np.ndarray[Any, Any]) -> str:
        self.initializers[name] = self.onnx.numpy_helper.from_array(array, name)
        return name

    def _node(self, op_type: str, inputs: Sequence[str], output: str, **attributes: Any) -> None:
        self.nodes.append(self.onnx.helper.make_node(op_type, list(inputs), [output], **attributes))


def _scalar(scale: Tensor) -> np.ndarray[Any, Any]:
    # np.asarray keeps it 0-d, which ONNX Runtime's fusions need.
    return np.asarray(scale.numpy(), dtype=np.float32)


def _storage(grid: Grid, zero_point: Tensor) -> np.ndarray[Any, Any]:
    if grid.qmin != 0 or grid.qmax > 255:
        raise EdgeqatError(f"found the activation grid {grid.qmin}..{grid.qmax}, wanted one that uint8 stores")
    return np.asarray(int(zero_point), dtype=np.uint8)
