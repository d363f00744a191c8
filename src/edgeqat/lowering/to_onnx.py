"""Spelling a quantized program in ONNX, the way ONNX Runtime's integer kernels want it.

Every value with a grid is a uint8 tensor under its own name. What computes is written DequantizeLinear -> op ->
QuantizeLinear, which ONNX Runtime fuses into one integer kernel; what only moves integers (reshape, transpose,
slice, pad, max pool) acts on the uint8 tensor itself, so nothing depends on an optimiser there. Facts this relies
on, each measured:

- scale and zero point of a per-tensor grid are 0-d: shape [1] silently blocks the fusion of additions;
- weights of up to 4 bits are INT4 behind a Cast to INT8, which is done once, when the file is loaded: a
  DequantizeLinear of INT4 leaves the layer in float;
- a Clip over the uint8 tensor, behind its QuantizeLinear, ends a grid of fewer than 8 bits;
- biases are int32 behind a DequantizeLinear: float ones leave the layer in float;
- global pooling is GlobalAveragePool: ReduceMean stays float;
- an activation function is the clamp of QuantizeLinear: no Relu node.

Names of scales and intermediate tensors are short, because in a small model they are a visible part of the file.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeqat.lowering.onnx_island import Islands
from edgeqat.lowering.onnx_lookup import ARITHMETICS_OF_A_FILE, along, exact_in_kernels, gather, kernels, lines
from edgeqat.lowering.onnx_moving import move
from edgeqat.lowering.onnx_session import optimized_ops
from edgeqat.lowering.onnx_weighted import weighted
from edgeqat.lowering.onnx_writer import OPSET, Writer, import_onnx
from edgeqat.lowering.spelling import Spelling
from edgeqat.op_attrs import AveragePoolAttrs, ConcatAttrs
from edgeqat.program import WEIGHTED, Kind, Op, QuantizedProgram

if TYPE_CHECKING:
    import onnx

__all__ = ["OPSET", "payload_bytes", "spell", "spell_model", "taps_suffix"]

COMBINED = {Kind.ADD: "Add", Kind.MUL: "Mul", Kind.MATMUL: "MatMul", Kind.CONCAT: "Concat"}
"""Ops over several values."""

ORT_QUANTIZES = frozenset({"Conv", "ConvTranspose", "Gemm"})
"""Float layers whose weights ONNX Runtime quantizes by itself where they stand between integers."""

ORT_SEES_THROUGH = frozenset(
    {"Dropout", "Identity", "MaxPool", "Pad", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"}
)
"""Ops that its optimiser removes, merges into the layer, or behind which it moves the DequantizeLinear before them."""


def spell(program: QuantizedProgram, engine: str | None, storage: str = "uint8", packs: bool = True) -> Spelling:
    """The ONNX file of a program; `engine` is of no meaning here; see `spell_model` for the others.

    Raises:
        MissingRuntimeError: onnx or onnxruntime is not installed.
    """
    model = spell_model(program, storage, packs=packs)
    data: bytes = model.SerializeToString(deterministic=True)
    return Spelling(
        file_name="model.onnx",
        data=data,
        engine="CPUExecutionProvider",
        arithmetics=ARITHMETICS_OF_A_FILE,
        payload_bytes=payload_bytes(model),
        runtime_ops=optimized_ops(data),
        taps=taps_suffix(program, storage),
    )


def spell_model(
    program: QuantizedProgram, storage: str = "uint8", kernels: bool = True, packs: bool = True
) -> onnx.ModelProto:
    """The ONNX model of a program: QDQ form, dynamic batch, no metadata; passes onnx.checker.

    Args:
        program: The program.
        storage: How activations are stored, "uint8" or "int8".
        kernels: Whether ONNX Runtime's own kernels stand for the tables that they compute.
        packs: Whether weights of up to 4 bits are stored in 4.

    Raises:
        MissingRuntimeError: onnx is not installed.
    """
    onnx = import_onnx()
    model = _Speller(program, storage, kernels, packs).model()
    onnx.checker.check_model(model, full_check=True)
    return model


def taps_suffix(program: QuantizedProgram, storage: str = "uint8") -> bytes:
    """Bytes that, appended to the model file, make every value with a grid an output.

    Concatenating serialised protobuf messages merges them, so a device with nothing but the runtime can look
    inside the very file it runs.
    """
    onnx = import_onnx()
    dtype = onnx.TensorProto.UINT8 if storage == "uint8" else onnx.TensorProto.INT8
    outputs = [onnx.helper.make_tensor_value_info(n, dtype, None) for n in program.tapped()]
    suffix: bytes = onnx.ModelProto(graph=onnx.GraphProto(output=outputs)).SerializeToString()
    return suffix


def payload_bytes(model: onnx.ModelProto) -> int:
    """Bytes of weights and biases alone: initializers that are neither scale nor zero point nor a shape."""
    parameters = {
        i for node in model.graph.node for i in node.input[1:3] if node.op_type in ("Conv", "Gemm", "MatMul")
    }
    for op_type in ("DequantizeLinear", "Cast"):
        through = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == op_type}
        parameters = {through.get(name, name) for name in parameters}
    return sum(_stored_bytes(t) for t in model.graph.initializer if t.name in parameters)


def _stored_bytes(tensor: onnx.TensorProto) -> int:
    packed: bool = tensor.data_type == tensor.INT4
    # As an array, integers of 4 bits have a byte each.
    return len(tensor.raw_data) if packed else int(import_onnx().numpy_helper.to_array(tensor).nbytes)


class _Speller:
    """Writes the nodes of each op in program order."""

    def __init__(self, program: QuantizedProgram, storage: str, kernels: bool, packs: bool) -> None:
        self.program, self.writer = program, Writer(program, storage, packs)
        self.islands = Islands(program, self.writer.opset)
        self.floats_of_integers = {op.name for op in program.ops if op.kind is Kind.DEQUANTIZE}
        own = kernels and storage == "uint8"
        self.exact = exact_in_kernels(program) if own else frozenset()
        self.lines = lines(program, self.exact) if own else {}

    def model(self) -> onnx.ModelProto:
        for op in self.program.ops:
            self._op(op)
        return self.writer.model()

    def _op(self, op: Op) -> None:
        w = self.writer
        if op.kind is Kind.FLOAT:
            nodes, initializers = self.islands.inline(op, w.fresh("i"))
            self._float_island(op, nodes)
            w.initializers |= {t.name: t for t in initializers}
        elif op.kind is Kind.QUANTIZE:
            w.quantize(op.inputs[0], op.name, op.name)
        elif op.kind is Kind.DEQUANTIZE:
            w.node("DequantizeLinear", [op.inputs[0], *w.grid(op.inputs[0])], op.name)
        elif op.kind is Kind.CONSTANT:
            data = self.program.consts[op.name].data
            assert data is not None
            w.initializer(op.name, w.stored(data.numpy()))
        elif op.kind in WEIGHTED:
            weighted(w, op)
        elif op.kind in COMBINED:
            attributes = {"axis": op.attrs.dim} if isinstance(op.attrs, ConcatAttrs) else {}
            w.computed(op, COMBINED[op.kind], [w.dequantize(name) for name in op.inputs], attributes)
        elif op.kind is Kind.AVERAGE_POOL:
            self._average_pool(op)
        elif op.kind is Kind.LOOKUP and op.name in self.exact:
            kernels(w, op, op.inputs[0], op.name)
        elif op.name in self.lines:
            along(w, op, self.lines[op.name])
        elif op.kind is Kind.LOOKUP:
            gather(w, op)
        else:
            move(w, op)

    def _float_island(self, op: Op, nodes: Sequence[Any]) -> None:
        """Adds an island's nodes, guarding layers over dequantized values: ONNX Runtime would quantize their weights.

        It takes every Conv, ConvTranspose and Gemm between a DequantizeLinear and a QuantizeLinear for a quantized
        layer whose weights were forgotten. A Clip at the lowest float changes nothing and keeps them apart.
        """
        dequantized = self.floats_of_integers.intersection(op.inputs)
        for node in nodes:
            if node.op_type in ORT_QUANTIZES and node.input[0] in dequantized:
                guarded = self.writer.fresh("g")
                lowest = self.writer.constant(np.asarray(np.finfo(np.float32).min, np.float32))
                self.writer.node("Clip", [node.input[0], lowest], guarded)
                node.input[0] = guarded
            elif node.op_type in ORT_SEES_THROUGH and node.input[0] in dequantized:
                dequantized.update(node.output)
            self.writer.nodes.append(node)

    def _average_pool(self, op: Op) -> None:
        a = op.attrs
        assert isinstance(a, AveragePoolAttrs)
        inputs = [self.writer.dequantize(op.inputs[0])]
        if a.kernel is None:
            self.writer.computed(op, "GlobalAveragePool", inputs)
            return
        self.writer.computed(
            op,
            "AveragePool",
            inputs,
            {
                "kernel_shape": list(a.kernel),
                "strides": list(a.stride),
                "pads": list(a.padding) * 2,
                "count_include_pad": int(a.count_include_pad),
            },
        )
