"""LiteRT spelling of what has weights: convolutions over images with their channels last, and linear layers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgeqat.lowering.litert_writer import Array, Writer, sizes_of
from edgeqat.lowering.shortcut import Shortcut
from edgeqat.op_attrs import ConvAttrs
from edgeqat.program import Op

__all__ = ["CHANNELS_LAST", "SAME", "VALID", "convolution", "linear", "pad_for", "shortcut"]

SAME, VALID = 0, 1
"""Padding, as the format numbers it."""

CHANNELS_LAST = {3: (0, 2, 1), 4: (0, 2, 3, 1)}
"""By the number of dimensions: the order in which kernels want them."""

Sides = Sequence[tuple[int, int]]


def convolution(writer: Writer, op: Op) -> None:
    """Adds a convolution; one over sequences is one over images of height 1."""
    a, program = op.attrs, writer.program
    assert isinstance(a, ConvAttrs) and op.weight is not None
    order = CHANNELS_LAST[len(a.stride) + 2]
    x, shape = writer.ordered(op.inputs[0], order), writer.shape_in(op.inputs[0], order)
    result, out_shape = writer.make(op.name, order), writer.shape_in(op.name, order)
    kernel = _weights(writer, op)
    stride, dilation, sides = a.stride, a.dilation, a.padding
    flat = len(a.stride) == 1
    if flat:
        stride, dilation, sides, kernel = (1, *stride), (1, *dilation), ((0, 0), *sides), kernel[:, :, None]
        shape, out_shape = (shape[0], 1, *shape[1:]), (out_shape[0], 1, *out_shape[1:])
        x = _reshaped(writer, x, shape, op.inputs[0])
    x, padding = pad_for(writer, op.inputs[0], x, shape, out_shape, kernel.shape[2:], stride, dilation, sides)
    y = writer.tensor(out_shape, program.grid_of(op.name)) if flat else result
    options = {
        "padding": padding,
        "strideH": stride[0],
        "strideW": stride[1],
        "dilationHFactor": dilation[0],
        "dilationWFactor": dilation[1],
    }
    if a.groups == len(kernel) > 1 and kernel.shape[1] == 1:
        options["depthMultiplier"] = 1
        data = np.ascontiguousarray(kernel.transpose(1, 2, 3, 0))
        writer.op("DEPTHWISE_CONV_2D", [x, *_parameters(writer, op, data, 3)], [y], options)
    else:
        data = np.ascontiguousarray(kernel.transpose(0, 2, 3, 1))
        writer.op("CONV_2D", [x, *_parameters(writer, op, data, 0)], [y], options)
    if flat:
        writer.op("RESHAPE", [y, writer.ints(*sizes_of(writer.shape_in(op.name, order)))], [result])


def shortcut(writer: Writer, op: Op, found: Shortcut) -> None:
    """Adds the conv that a padding of channels is together with the slices before it."""
    order, grid = CHANNELS_LAST[4], writer.program.grid_of(op.name)
    x, shape = writer.ordered(found.source, order), writer.shape_in(found.source, order)
    data = np.ascontiguousarray(found.weight(int(shape[3])).numpy().transpose(0, 2, 3, 1))
    scales, zeros = np.ones(len(data), np.float32), np.zeros(len(data), np.int64)
    weight = writer.constant(data, writer.quantization(scales, zeros))
    bias_scales = np.float32(grid.per_tensor()[0]) * scales
    bias = writer.constant(np.zeros(len(data), np.int32), writer.quantization(bias_scales, zeros))
    options = {"padding": VALID, "strideH": found.stride[0], "strideW": found.stride[1]}
    ones = {"dilationHFactor": 1, "dilationWFactor": 1}
    writer.op("CONV_2D", [x, weight, bias], [writer.make(op.name, order)], options | ones)


def linear(writer: Writer, op: Op) -> None:
    """Adds a linear layer over the last dimension."""
    rank = len(writer.program.values[op.name].shape)
    x, result = writer.plain(op.inputs[0]), writer.make(op.name, range(rank))
    parameters = _parameters(writer, op, _weights(writer, op), 0)
    writer.op("FULLY_CONNECTED", [x, *parameters], [result], {"keepNumDims": rank != 2})


def pad_for(
    writer: Writer,
    name: str,
    x: int,
    shape: Sequence[int | str],
    out_shape: Sequence[int | str],
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    sides: Sides,
    lowest: bool = False,
    counted: bool = False,
) -> tuple[int, int]:
    """Padding of windows over [N, H, W, C]: by the kernel itself where it can, else by an op before it.

    Args:
        name: The value that x holds.
        sides: (before, after) for height and width.
        lowest: Pad with the lowest integer, not with zero.
        counted: Whether an op is to pad, as where what is padded with counts in an average.

    Returns:
        The tensor to read, and SAME or VALID.
    """
    needed, own = [], []
    for i, (before, _) in enumerate(sides):
        size, out = int(shape[i + 1]), int(out_shape[i + 1])
        total = (out - 1) * stride[i] + (kernel[i] - 1) * dilation[i] + 1 - size
        needed.append((before, max(total - before, 0)))
        ours = max(total, 0)
        own.append((ours // 2, ours - ours // 2) if out == -(-size // stride[i]) else None)
    if not any(side for pair in needed for side in pair):
        return x, VALID
    if needed == own and not counted:
        return x, SAME
    padding = np.array([(0, 0), *needed, (0, 0)], np.int32)
    grid = writer.program.grid_of(name)
    sizes = [size + sum(pair) for size, pair in zip(map(int, shape[1:3]), needed, strict=True)]
    padded = writer.tensor((shape[0], *sizes, shape[3]), grid)
    inputs = [x, writer.constant(padding)]
    if lowest:
        writer.op("PADV2", [*inputs, writer.activations(np.array([grid.qmin]), grid)], [padded])
    else:
        writer.op("PAD", inputs, [padded])
    return padded, VALID


def _weights(writer: Writer, op: Op) -> Array:
    assert op.weight is not None
    data = writer.program.consts[op.weight].data
    assert data is not None
    found: Array = data.numpy()
    return found


def _parameters(writer: Writer, op: Op, data: Array, dimension: int) -> list[int]:
    """The tensors of a layer's weights, their channels along `dimension`, and of its bias."""
    program = writer.program
    assert op.weight is not None
    scale = program.consts[op.weight].grid.filled()[0].numpy()
    channels = data.shape[dimension]
    scales = np.broadcast_to(scale, (channels,)).astype(np.float32)
    zeros = np.zeros(channels, np.int64)
    weight = writer.constant(data, writer.quantization(scales, zeros, dimension))
    writer.payload_bytes += data.nbytes
    if op.bias is None:
        return [weight, -1] if dimension == 0 and data.ndim == 2 else [weight, _no_bias(writer, op, scales)]
    writer.payload_bytes += 4 * op.bias.numel()
    return [weight, _bias(writer, op, op.bias.numpy().astype(np.int32), scales)]


def _no_bias(writer: Writer, op: Op, scales: Array) -> int:
    return _bias(writer, op, np.zeros(len(scales), np.int32), scales)


def _bias(writer: Writer, op: Op, data: Array, scales: Array) -> int:
    input_scale = np.float32(writer.program.grid_of(op.inputs[0]).per_tensor()[0])
    return writer.constant(data, writer.quantization(input_scale * scales, np.zeros(len(data), np.int64)))


def _reshaped(writer: Writer, x: int, shape: Sequence[int | str], name: str) -> int:
    made = writer.tensor(shape, writer.program.grid_of(name))
    writer.op("RESHAPE", [x, writer.ints(*sizes_of(shape))], [made])
    return made
