"""Spelling integer ops as XNNPACK nodes: what has weights, combines values, or computes new ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch

from edgeqat.errors import EdgeqatError
from edgeqat.lowering.line_table import Line, as_image
from edgeqat.lowering.xnnpack_graph import ABSENT, CHANNELWISE_INT8, CHANNELWISE_INT32, Graph, Located, clamped
from edgeqat.lowering.xnnpack_lookup import function_node, spelled_line
from edgeqat.lowering.xnnpack_moving import in_order, move, reshaped, together
from edgeqat.op_attrs import AveragePoolAttrs, ConcatAttrs, ConvAttrs, ConvTransposeAttrs, LookupAttrs
from edgeqat.program import BATCH_DIM, PASSTHROUGH, Grid, Kind, Op, QuantizedProgram

__all__ = ["convolve2d", "spell_op"]

CHANNELS_LAST = (0, 2, 3, 1)
KEEP_DIMS = 0x40

WITHIN = PASSTHROUGH | {Kind.CONSTANT, Kind.AVERAGE_POOL, Kind.LOOKUP}
"""Kinds whose results do not leave their grid: averages have their input's, and tables clamp for themselves."""

T = TypeVar("T")

ONE = Grid(0, 255, None, torch.tensor(1.0), torch.tensor(0, dtype=torch.int32))
"""The grid of the number that brings a value onto another grid: its integer 1 is 1."""


def spell_op(graph: Graph, program: QuantizedProgram, op: Op, args: Sequence[Located]) -> Located:
    """Appends the nodes of an integer op; returns its result, clamped where its grid ends."""
    y = _spelled(graph, program, op, args)
    return y if op.kind in WITHIN else clamped(graph, y)


def _spelled(graph: Graph, program: QuantizedProgram, op: Op, args: Sequence[Located]) -> Located:
    if op.kind in (Kind.QUANTIZE, Kind.DEQUANTIZE):
        return _convert(graph, args[0], program.values[op.name].grid)
    grid = program.grid_of(op.name)
    if op.kind is Kind.CONSTANT:
        data = program.consts[op.name].data
        assert data is not None
        return graph.constant(data, grid, tuple(range(data.dim())))
    if isinstance(op.attrs, ConvAttrs | ConvTransposeAttrs):
        return _convolve(graph, program, op, args[0], grid)
    if op.kind is Kind.LINEAR:
        return _linear(graph, program, op, args[0], grid)
    if op.kind in (Kind.ADD, Kind.MUL):
        return combined(graph, op.kind, args[0], args[1], grid)
    if isinstance(op.attrs, ConcatAttrs):
        return _concat(graph, op.attrs.dim, args, grid)
    if isinstance(op.attrs, LookupAttrs):
        line = spelled_line(program, op)
        found = function_node(graph, op.attrs, args[0], grid) if line is None else _line(graph, line, args[0], grid)
        assert found is not None
        return found
    if isinstance(op.attrs, AveragePoolAttrs):
        return _average_pool(graph, op.attrs, args[0], grid)
    if op.kind in PASSTHROUGH:
        return move(graph, op, args[0])
    raise EdgeqatError(f"{op.name}: no XNNPACK spelling for kind {op.kind.value}")


def _convert(graph: Graph, x: Located, grid: Grid | None) -> Located:
    """Between float32 and integers; what becomes float is first brought into the program's order."""
    if grid is None:
        x = in_order(graph, x, tuple(range(len(x.shape))))
    y = graph.tensor(x.shape, x.order, grid)
    graph.node(graph.schema.XNNConvert(x.id, y.id, 0))
    return y


def _bias(graph: Graph, program: QuantizedProgram, op: Op, scale: torch.Tensor) -> int:
    if op.bias is None:
        return ABSENT
    input_scale, _ = program.grid_of(op.inputs[0]).filled()
    return graph.weights(op.bias.to(torch.int32), input_scale * scale, 0, CHANNELWISE_INT32)


def _weight(program: QuantizedProgram, op: Op) -> tuple[torch.Tensor, torch.Tensor]:
    """Integers, and a scale for each output channel."""
    assert op.weight is not None
    const = program.consts[op.weight]
    assert const.data is not None
    scale, _ = const.grid.filled()
    outputs = const.data.shape[1 if op.kind is Kind.CONV_TRANSPOSE else 0]
    return const.data, scale.expand(outputs).contiguous()


def _linear(graph: Graph, program: QuantizedProgram, op: Op, x: Located, grid: Grid) -> Located:
    data, scale = _weight(program, op)
    x = in_order(graph, x, tuple(range(len(x.shape))))
    y = graph.tensor((*x.shape[:-1], len(data)), x.order, grid)
    weight = graph.weights(data, scale, 0, CHANNELWISE_INT8)
    bias = _bias(graph, program, op, scale)
    graph.node(graph.schema.XNNFullyConnected(x.id, weight, bias, y.id, 0))
    return y


def _convolve(graph: Graph, program: QuantizedProgram, op: Op, x: Located, grid: Grid) -> Located:
    data, scale = _weight(program, op)
    shape = program.values[op.name].shape
    bias = _bias(graph, program, op, scale)
    if data.dim() == 4:
        return convolve2d(graph, op, x, data, scale, bias, (x.shape[0], *map(int, shape[1:])), grid)
    n, channels, length = x.shape
    image = reshaped(graph, in_order(graph, x, (0, 2, 1)), (n, channels, 1, length), CHANNELS_LAST)
    y = convolve2d(graph, op, image, data[:, :, None], scale, bias, (n, int(shape[1]), 1, int(shape[2])), grid)
    return reshaped(graph, y, (n, int(shape[1]), int(shape[2])), (0, 2, 1))


def convolve2d(
    graph: Graph,
    op: Op,
    x: Located,
    data: torch.Tensor,
    scale: torch.Tensor,
    bias: int,
    shape: tuple[int, ...],
    grid: Grid,
) -> Located:
    """Appends a conv or transposed conv of images.

    Args:
        graph: The graph.
        op: Its attributes are read, nothing else.
        x: [N, C, H, W].
        data: int8, as torch has it.
        scale: float32, one for each output channel.
        bias: The number of a constant.
        shape: Of the result.
        grid: Of the result.
    """
    a = op.attrs
    assert isinstance(a, ConvAttrs | ConvTransposeAttrs)
    x = in_order(graph, x, CHANNELS_LAST)
    y = graph.tensor(shape, CHANNELS_LAST, grid)
    groups = a.groups if isinstance(a, ConvAttrs) else 1
    (top, bottom), (left, right) = _of_image(
        [pair if isinstance(pair, tuple) else (pair, pair) for pair in a.padding], (0, 0)
    )
    stride, dilation = _of_image(a.stride, 1), _of_image(a.dilation, 1)
    added = _of_image(a.output_padding if isinstance(a, ConvTransposeAttrs) else (0, 0), 0)
    make, weight = _kernel(graph, a, data, scale)
    node = make(
        padding_top=top,
        padding_right=right,
        padding_bottom=bottom,
        padding_left=left,
        kernel_height=data.shape[2],
        kernel_width=data.shape[3],
        subsampling_height=stride[0],
        subsampling_width=stride[1],
        dilation_height=dilation[0],
        dilation_width=dilation[1],
        group_input_channels=x.shape[1] // groups,
        group_output_channels=shape[1] // groups,
        groups=groups,
        adjustment_height=added[0],
        adjustment_width=added[1],
        input1_id=x.id,
        filter_id=weight,
        bias_id=bias,
        output_id=y.id,
        flags=0,
    )
    graph.node(node)
    return y


def _kernel(
    graph: Graph, attrs: ConvAttrs | ConvTransposeAttrs, data: torch.Tensor, scale: torch.Tensor
) -> tuple[Any, int]:
    """The kind of node of a conv, and the number of its weights in the order that it takes them in."""
    if isinstance(attrs, ConvTransposeAttrs):
        weight = graph.weights(data.permute(1, 2, 3, 0), scale, 0, CHANNELWISE_INT8)
        return graph.schema.XNNConvTranspose2d, weight
    if data.shape[1] == 1:
        return graph.schema.XNNDepthwiseConv2d, graph.weights(data.permute(1, 2, 3, 0), scale, 3, CHANNELWISE_INT8)
    return graph.schema.XNNConv2d, graph.weights(data.permute(0, 2, 3, 1), scale, 0, CHANNELWISE_INT8)


def _of_image(given: Sequence[T], missing: T) -> list[T]:
    """What a conv says of its dimensions, for two: a conv1d is a conv2d of images one pixel high."""
    return [missing] * (2 - len(given)) + list(given)


def combined(graph: Graph, kind: Kind, a: Located, b: Located, grid: Grid) -> Located:
    """The sum or product of two values whose shapes broadcast."""
    rank = max(len(a.shape), len(b.shape))
    a, b = (_with_rank(graph, x, rank) for x in (a, b))
    order = a.order if a.shape.count(1) <= b.shape.count(1) else b.order
    a, b = (in_order(graph, x, order) for x in (a, b))
    shape = tuple(max(pair) for pair in zip(a.shape, b.shape, strict=True))
    y = graph.tensor(shape, order, grid)
    make = graph.schema.XNNAdd if kind is Kind.ADD else graph.schema.XNNMultiply
    graph.node(make(a.id, b.id, y.id, 0))
    return y


def _with_rank(graph: Graph, x: Located, rank: int) -> Located:
    """With dimensions of size 1 in front."""
    if len(x.shape) == rank:
        return x
    new = rank - len(x.shape)
    order = (*range(new), *(dim + new for dim in x.order))
    return reshaped(graph, x, (1,) * new + x.shape, order)


def _concat(graph: Graph, dim: int, args: Sequence[Located], grid: Grid) -> Located:
    rank = len(args[0].shape)
    one = None
    parts = []
    for x in args:
        if x.grid is not grid:
            one = graph.constant(torch.ones((1,) * rank), ONE, tuple(range(rank))) if one is None else one
            x = combined(graph, Kind.MUL, x, one, grid)
        parts.append(x)
    return together(graph, parts, dim % rank)


def _line(graph: Graph, line: Line, x: Located, grid: Grid) -> Located:
    """Over an image as it lies in memory: every channel has the same line."""
    x = x if x.order[0] == 0 else in_order(graph, x, tuple(range(len(x.shape))))
    n, *rest = x.sizes
    sizes = as_image((BATCH_DIM, *rest))
    assert sizes is not None
    height, width, channels = sizes
    image = reshaped(graph, x, (n, channels, height, width), CHANNELS_LAST)
    data = torch.full((channels, 1, 1, 1), line.weight, dtype=torch.int8)
    scale, bias = torch.full((channels,), line.scale), torch.full((channels,), line.bias, dtype=torch.int32)
    assert x.grid is not None
    input_scale, _ = x.grid.filled()
    number = graph.weights(bias, input_scale * scale, 0, CHANNELWISE_INT32)
    conv = Op(Kind.CONV, (), ("line",), ConvAttrs((1, 1), ((0, 0), (0, 0)), (1, 1), channels))
    y = convolve2d(graph, conv, image, data, scale, number, image.shape, grid)
    return clamped(graph, reshaped(graph, y, x.shape, x.order))


def _average_pool(graph: Graph, attrs: AveragePoolAttrs, x: Located, grid: Grid) -> Located:
    x = in_order(graph, x, CHANNELS_LAST)
    if attrs.kernel is None:
        y = graph.tensor((*x.shape[:2], 1, 1), CHANNELS_LAST, grid)
        graph.node(graph.schema.XNNGlobalAvgPooling2d(x.id, y.id, KEEP_DIMS))
        return y
    # XNNPACK has no integer average pool over windows: a depthwise conv whose weights are all 1, at a scale of 1 / n.
    (kernel_h, kernel_w), channels = attrs.kernel, x.shape[1]
    pads = tuple((p, p) for p in attrs.padding)
    conv = Op(Kind.CONV, (), ("mean",), ConvAttrs(attrs.stride, pads, (1, 1), channels))
    data = torch.ones(channels, 1, kernel_h, kernel_w, dtype=torch.int8)
    scale = (torch.tensor(1.0) / (kernel_h * kernel_w)).expand(channels).contiguous()
    sizes = [
        (size + 2 * pad - kernel) // stride + 1
        for size, pad, kernel, stride in zip(x.shape[2:], attrs.padding, attrs.kernel, attrs.stride, strict=True)
    ]
    return convolve2d(graph, conv, x, data, scale, ABSENT, (*x.shape[:2], *sizes), grid)
