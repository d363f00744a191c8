"""XNNPACK nodes that move integers: reshapes, transposes, slices, pads, copies, and max pools.

A permutation moves nothing: its result lies in another order of dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from edgeqat.errors import EdgeqatError
from edgeqat.lowering.padding import padding_index
from edgeqat.lowering.xnnpack_graph import Graph, Located, Order, same_memory
from edgeqat.op_attrs import (
    ClampAttrs,
    ExpandAttrs,
    MaxPoolAttrs,
    PadAttrs,
    PermuteAttrs,
    ResizeAttrs,
    SliceAttrs,
    ViewAttrs,
)
from edgeqat.program import Op

__all__ = ["in_order", "move", "reshaped", "together"]

MOST_PARTS = 5
"""Parts that one concatenation takes."""

BATCH = 0
"""How a node says that it wants a size inferred."""


def in_order(graph: Graph, x: Located, order: Order) -> Located:
    """The same values, lying in another order."""
    if x.order == order:
        return x
    if same_memory(x.shape, x.order, order):
        return reshaped(graph, x, x.shape, order)
    y = graph.tensor(x.shape, order, x.grid)
    perm = [x.order.index(dim) for dim in order]
    graph.node(graph.schema.XNNStaticTranspose(len(order), perm, x.id, y.id, 0))
    return y


def reshaped(graph: Graph, x: Located, shape: tuple[int, ...], order: Order, inferred: int = 0) -> Located:
    """The same elements in the same sequence, as a tensor of another shape and order.

    `inferred` is the dimension in memory that depends on the batch.
    """
    renamed = Located(x.id, shape, order, x.grid)
    if renamed.sizes == x.sizes:
        return renamed
    y = graph.tensor(shape, order, x.grid)
    sizes = [BATCH if at == inferred else size for at, size in enumerate(y.sizes)]
    graph.node(graph.schema.XNNStaticReshape(len(sizes), sizes, x.id, y.id, 0))
    return y


def together(graph: Graph, parts: Sequence[Located], dim: int) -> Located:
    """Values on one grid, one after the other."""
    order = parts[0].order
    left = [in_order(graph, part, order) for part in parts]
    while len(left) > 1:
        group = [left[start : start + MOST_PARTS] for start in range(0, len(left), MOST_PARTS)]
        left = [_concatenated(graph, found, dim) if len(found) > 1 else found[0] for found in group]
    return left[0]


def _concatenated(graph: Graph, parts: Sequence[Located], dim: int) -> Located:
    first = parts[0]
    shape = list(first.shape)
    shape[dim] = sum(part.shape[dim] for part in parts)
    y = graph.tensor(tuple(shape), first.order, first.grid)
    ids = [part.id for part in parts] + [2**32 - 1] * (MOST_PARTS - len(parts))
    make = getattr(graph.schema, f"XNNConcatenate{len(parts)}")
    graph.node(
        make(
            axis=first.order.index(dim),
            **{f"input{i}_id": number for i, number in enumerate(ids, 1)},
            output_id=y.id,
            flags=0,
        )
    )
    return y


def move(graph: Graph, op: Op, x: Located) -> Located:
    """What keeps its input's grid."""
    a = op.attrs
    if isinstance(a, ViewAttrs):
        return _view(graph, a, x)
    if isinstance(a, PermuteAttrs):
        return Located(x.id, tuple(x.shape[d] for d in a.dims), tuple(a.dims.index(d) for d in x.order), x.grid)
    if isinstance(a, ClampAttrs):
        y = graph.tensor(x.shape, x.order, x.grid)
        graph.node(graph.schema.XNNClamp(x.id, y.id, 0), (0.0, math.inf))
        return y
    if isinstance(a, MaxPoolAttrs):
        return _max_pool(graph, a, x)
    if isinstance(a, PadAttrs):
        return _pad(graph, a, x)
    if isinstance(a, SliceAttrs):
        size = x.shape[a.dim]
        return strided(graph, x, a.dim, *slice(a.start, a.stop, a.step).indices(size))
    if isinstance(a, ResizeAttrs):
        for dim, factor in enumerate(a.factors, 2):
            x = _repeated(graph, x, dim, factor)
        return x
    if isinstance(a, ExpandAttrs):
        return _expand(graph, a, x)
    raise EdgeqatError(f"{op.name}: no XNNPACK spelling for kind {op.kind.value}")


def _view(graph: Graph, attrs: ViewAttrs, x: Located) -> Located:
    x = in_order(graph, x, tuple(range(len(x.shape))))
    known = math.prod(size for size in attrs.shape if size != -1)
    shape = tuple(math.prod(x.shape) // known if size == -1 else size for size in attrs.shape)
    inferred = attrs.shape.index(-1) if -1 in attrs.shape else 0
    return reshaped(graph, x, shape, tuple(range(len(shape))), inferred)


def _max_pool(graph: Graph, attrs: MaxPoolAttrs, x: Located) -> Located:
    x = in_order(graph, x, (0, 2, 3, 1))
    sizes, after = [], []
    for i, size in enumerate(x.shape[2:]):
        reach = attrs.dilation[i] * (attrs.kernel[i] - 1) + 1
        span = size + 2 * attrs.padding[i] - reach
        n = (-(-span // attrs.stride[i]) if attrs.ceil_mode else span // attrs.stride[i]) + 1
        if (n - 1) * attrs.stride[i] >= size + attrs.padding[i]:  # a window begins inside the input or its padding
            n -= 1
        sizes.append(n)
        after.append(max(attrs.padding[i], (n - 1) * attrs.stride[i] + reach - size - attrs.padding[i]))
    y = graph.tensor((*x.shape[:2], *sizes), x.order, x.grid)
    graph.node(
        graph.schema.XNNMaxPooling2d(
            padding_top=attrs.padding[0],
            padding_right=after[1],
            padding_bottom=after[0],
            padding_left=attrs.padding[1],
            pooling_height=attrs.kernel[0],
            pooling_width=attrs.kernel[1],
            stride_height=attrs.stride[0],
            stride_width=attrs.stride[1],
            dilation_height=attrs.dilation[0],
            dilation_width=attrs.dilation[1],
            input_id=x.id,
            output_id=y.id,
            flags=0,
        )
    )
    return y


def _pad(graph: Graph, attrs: PadAttrs, x: Located) -> Located:
    if attrs.mode == "constant":
        return _padded(graph, x, attrs.padding)
    for dim, (before, after) in enumerate(attrs.padding):
        if before or after:
            x = _picked(graph, x, dim, padding_index(attrs.mode, x.shape[dim], before, after).tolist())
    return x


def _padded(graph: Graph, x: Located, padding: Sequence[tuple[int, int]]) -> Located:
    """With real zeros around it."""
    shape = tuple(before + size + after for size, (before, after) in zip(x.shape, padding, strict=True))
    y = graph.tensor(shape, x.order, x.grid)
    before, after = ([padding[dim][side] for dim in x.order] for side in (0, 1))
    graph.node(graph.schema.XNNStaticConstantPad(before, after, 0.0, x.id, y.id, 0))
    return y


def _picked(graph: Graph, x: Located, dim: int, index: list[int]) -> Located:
    """Elements along a dimension by their indexes: runs of them, one after the other."""
    breaks = [0, *(i for i, (a, b) in enumerate(pairwise(index), 1) if b != a + 1), len(index)]
    runs = [(index[start], end - start) for start, end in pairwise(breaks)]
    return together(graph, [sliced(graph, x, dim, start, count) for start, count in runs], dim)


def sliced(graph: Graph, x: Located, dim: int, start: int, count: int) -> Located:
    """`count` elements along a dimension, from `start`."""
    if (start, count) == (0, x.shape[dim]):
        return x
    shape = tuple(count if d == dim else size for d, size in enumerate(x.shape))
    y = graph.tensor(shape, x.order, x.grid)
    offsets = [start if d == dim else 0 for d in x.order]
    sizes = [count if d == dim else 0 for d in x.order]
    graph.node(graph.schema.XNNStaticSlice(len(offsets), offsets, sizes, x.id, y.id, 0))
    return y


def strided(graph: Graph, x: Located, dim: int, start: int, stop: int, step: int) -> Located:
    """x[start:stop:step] along a dimension: rows of `step` elements, of which the first stays."""
    count = len(range(start, stop, step))
    if step == 1:
        return sliced(graph, x, dim, start, count)
    x = sliced(graph, x, dim, start, min(count * step, x.shape[dim] - start))
    missing = count * step - x.shape[dim]
    if missing:
        x = _padded(graph, x, [(0, missing if d == dim else 0) for d in range(len(x.shape))])
    rows = _split(graph, x, dim, count, step)
    first = sliced(graph, rows, 1, 0, 1)
    shape = tuple(count if d == dim else size for d, size in enumerate(x.shape))
    return reshaped(graph, first, shape, x.order)


def _split(graph: Graph, x: Located, dim: int, count: int, step: int) -> Located:
    """One dimension as two, everything before and behind it as one each: (before, step, behind, count) for the names
    0, 1, 2, 3, lying as before, count, step, behind; the batch stays in front where it is alone."""
    at = x.order.index(dim)
    before, behind = math.prod(x.sizes[:at]), math.prod(x.sizes[at + 1 :])
    return reshaped(graph, x, (before, step, behind, count), (0, 3, 1, 2))


def _repeated(graph: Graph, x: Located, dim: int, factor: int) -> Located:
    """Each element along a dimension so many times."""
    if factor == 1:
        return x
    size = x.shape[dim]
    rows = _split(graph, x, dim, size, 1)
    copies = together(graph, [rows] * factor, 1)
    shape = tuple(n * factor if d == dim else n for d, n in enumerate(x.shape))
    return reshaped(graph, copies, shape, x.order)


def _expand(graph: Graph, attrs: ExpandAttrs, x: Located) -> Located:
    for dim, size in enumerate(attrs.shape):
        if size not in (-1, x.shape[dim]):
            x = together(graph, [x] * size, dim)
    return x
