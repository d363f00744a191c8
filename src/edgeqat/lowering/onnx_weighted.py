"""ONNX spelling of the ops with weights: DequantizeLinear -> Conv or Gemm -> QuantizeLinear, with int32 biases."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgeqat.lowering.onnx_moving import cut
from edgeqat.lowering.onnx_writer import Writer
from edgeqat.op_attrs import ConvAttrs, ConvTransposeAttrs
from edgeqat.program import Const, Op

__all__ = ["weighted"]


def weighted(writer: Writer, op: Op) -> None:
    """Adds the nodes of a conv, transposed conv or linear."""
    assert op.weight is not None
    const = writer.program.consts[op.weight]
    assert const.data is not None
    if isinstance(op.attrs, ConvAttrs):
        a = op.attrs
        pads = [before for before, _ in a.padding] + [after for _, after in a.padding]
        inputs = [writer.dequantize(op.inputs[0]), *_parameters(writer, op, const, const.data, const.grid.axis)]
        _conv(writer, op, inputs, list(const.data.shape[2:]), pads, a.stride, a.dilation, a.groups)
    elif isinstance(op.attrs, ConvTransposeAttrs):
        _conv_transpose(writer, op, op.attrs, const, const.data)
    else:
        _linear(writer, op, const, const.data)


def _conv(
    writer: Writer,
    op: Op,
    inputs: list[str],
    kernel: list[int],
    pads: list[int],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> None:
    windows = {"kernel_shape": kernel, "strides": list(stride), "pads": pads, "dilations": list(dilation)}
    writer.computed(op, "Conv", inputs, {"group": groups, **windows})


def _linear(writer: Writer, op: Op, const: Const, data: Tensor) -> None:
    """Gemm takes matrices: of other inputs the dimensions before the last become one, and are put back behind it."""
    x, shape = op.inputs[0], writer.program.values[op.inputs[0]].shape
    parameters = _parameters(writer, op, const, data, const.grid.axis)
    if len(shape) == 2:
        writer.computed(op, "Gemm", [writer.dequantize(x), *parameters], {"transB": 1})
        return
    flat = writer.result("r", "Reshape", [x, writer.integers(-1, data.shape[1])])
    rows = writer.fresh("r")
    writer.computed(op, "Gemm", [writer.dequantize_once(flat, flat, x), *parameters], {"transB": 1}, rows)
    sizes = [size if isinstance(size, int) else -1 for size in shape[:-1]]
    writer.node("Reshape", [rows, writer.integers(*sizes, data.shape[0])], op.name)


def _conv_transpose(writer: Writer, op: Op, a: ConvTransposeAttrs, const: Const, data: Tensor) -> None:
    """A conv with the mirrored weight over an input with zero points between its elements.

    ONNX Runtime has no integer kernel for ConvTranspose. Zero points add nothing to the sums, so they are the same.
    """
    x, dims = op.inputs[0], len(a.stride)
    kernel = list(data.shape[2:])
    reach = [d * (k - 1) for d, k in zip(a.dilation, kernel, strict=True)]
    before = [r - p for r, p in zip(reach, a.padding, strict=True)]
    after = [b + more - (s - 1) for b, more, s in zip(before, a.output_padding, a.stride, strict=True)]
    x = _spread(writer, x, a.stride, writer.program.values[x].shape)
    for dim in range(dims):  # a conv's padding cannot be negative
        if before[dim] < 0 or after[dim] < 0:
            stop = after[dim] if after[dim] < 0 else 2**31 - 1
            x = cut(writer, x, dim + 2, max(-before[dim], 0), stop)
    mirrored = data.flip(list(range(2, data.dim()))).transpose(0, 1).contiguous()
    parameters = _parameters(writer, op, const, mirrored, None if const.grid.axis is None else 0)
    floats = writer.dequantize_once(x, x, op.inputs[0])
    pads = [max(side, 0) for side in (*before, *after)]
    _conv(writer, op, [floats, *parameters], kernel, pads, (1,) * dims, a.dilation, 1)


def _spread(writer: Writer, x: str, stride: tuple[int, ...], shape: tuple[int | str, ...]) -> str:
    """Puts stride - 1 zero points behind each element of [N, C, ...]: a dimension of 1, padded, and merged."""
    if all(step == 1 for step in stride):
        return x
    sizes = [int(size) for size in shape[1:]]
    apart = [-1, sizes[0], *(n for size in sizes[1:] for n in (size, 1))]
    pads = [0] * len(apart) + [0, 0, *(n for step in stride for n in (0, step - 1))]
    together = [-1, sizes[0], *(size * step for size, step in zip(sizes[1:], stride, strict=True))]
    zero = writer.grid(x)[1]
    x = writer.result("r", "Reshape", [x, writer.integers(*apart)])
    x = writer.result("p", "Pad", [x, writer.integers(*pads), zero])
    return writer.result("r", "Reshape", [x, writer.integers(*together)])


def _parameters(writer: Writer, op: Op, const: Const, data: Tensor, axis: int | None) -> list[str]:
    """The dequantized weight, and the bias if there is one."""
    short = writer.fresh("w")
    weight = _weight(writer, const, data, axis, short)
    return [weight] if op.bias is None else [weight, _bias(writer, op, const, op.bias, short)]


def _weight(writer: Writer, const: Const, data: Tensor, axis: int | None, short: str) -> str:
    key = f"#weight {const.source} {axis} {tuple(data.shape)}"
    if key in writer.weights:
        return writer.weights[key]
    scale, zero_point = const.grid.filled()
    result = f"{short}d"
    name = writer.weight(writer.own_name(const.source), const, data)
    writer.initializer(f"{short}s", scale.numpy())
    zero = writer.constant(zero_point.numpy().astype(np.int8))
    # Without a channel axis the attribute has no meaning, and an optimiser may stumble over it.
    attributes: dict[str, Any] = {} if axis is None else {"axis": axis}
    writer.node("DequantizeLinear", [name, f"{short}s", zero], result, attributes)
    writer.weights[key] = result
    return result


def _bias(writer: Writer, op: Op, const: Const, bias: Tensor, short: str) -> str:
    input_scale, _ = writer.program.grid_of(op.inputs[0]).filled()
    weight_scale, _ = const.grid.filled()
    name, result = writer.own_name(f"{op.name}:bias"), f"{short}e"
    writer.initializer(name, bias.numpy())
    scale = torch.as_tensor(input_scale * weight_scale)
    writer.initializer(f"{short}t", scale.numpy())
    writer.node("DequantizeLinear", [name, f"{short}t"], result, {"axis": 0} if scale.dim() else {})
    return result
