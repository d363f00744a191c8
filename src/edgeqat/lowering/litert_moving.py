"""LiteRT spelling of what only moves integers; a permutation is no op at all, only another order of dimensions."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from edgeqat.errors import EdgeqatError
from edgeqat.lowering.litert_weighted import CHANNELS_LAST, pad_for
from edgeqat.lowering.litert_writer import Array, Stored, Writer, sizes_of
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

__all__ = ["max_pool", "move"]

OUTER = 0b1001
"""The first and last of four dimensions, as STRIDED_SLICE numbers those that it leaves whole."""


def move(writer: Writer, op: Op) -> None:
    """Adds the ops of a kind in PASSTHROUGH."""
    a, name = op.attrs, op.inputs[0]
    if isinstance(a, ViewAttrs):
        _view(writer, op)
    elif isinstance(a, PermuteAttrs):
        found = writer.stored[name]
        writer.stored[op.name] = Stored(found.index, tuple(a.dims.index(dim) for dim in found.order), found.data)
    elif isinstance(a, MaxPoolAttrs):
        max_pool(writer, op, a)
    elif isinstance(a, ClampAttrs):
        x, order = writer.stored[name].index, writer.stored[name].order
        grid = writer.program.grid_of(op.name)
        floor = writer.activations(np.array([grid.per_tensor()[1]]), grid)
        writer.op("MAXIMUM", [x, floor], [writer.make(op.name, order)])
    elif isinstance(a, PadAttrs):
        _pad(writer, op, a)
    elif isinstance(a, SliceAttrs):
        _slice(writer, op, a)
    elif isinstance(a, ResizeAttrs):
        shape = writer.program.values[name].shape
        picks = {i + 2: np.arange(int(shape[i + 2]) * factor) // factor for i, factor in enumerate(a.factors)}
        _pick(writer, op, writer.stored[name], shape, picks)
    elif isinstance(a, ExpandAttrs):
        _expand(writer, op)
    else:
        raise EdgeqatError(f"{op.name}: no LiteRT spelling for kind {op.kind.value}")


def _view(writer: Writer, op: Op) -> None:
    shape = writer.program.values[op.name].shape
    x = writer.plain(op.inputs[0])
    assert isinstance(op.attrs, ViewAttrs)
    writer.op("RESHAPE", [x, writer.ints(*op.attrs.shape)], [writer.make(op.name, range(len(shape)))])


def max_pool(writer: Writer, op: Op, a: MaxPoolAttrs) -> None:
    """Adds a max pool; one with gaps is the maximum of slices."""
    order, name = CHANNELS_LAST[4], op.inputs[0]
    x, shape = writer.ordered(name, order), writer.shape_in(name, order)
    out = writer.shape_in(op.name, order)
    sides = [(pad, pad) for pad in a.padding]
    gaps = set(a.dilation) != {1}
    x, padding = pad_for(writer, name, x, shape, out, a.kernel, a.stride, a.dilation, sides, lowest=True, counted=gaps)
    result = writer.make(op.name, order)
    if gaps:
        _max_of_slices(writer, op, a, x, result)
        return
    options = {"padding": padding, "strideH": a.stride[0], "strideW": a.stride[1]}
    options |= {"filterHeight": a.kernel[0], "filterWidth": a.kernel[1]}
    writer.op("MAX_POOL_2D", [x], [result], options)


def _max_of_slices(writer: Writer, op: Op, a: MaxPoolAttrs, x: int, result: int) -> None:
    """The largest of what each element of the window sees, [N, H, W, C]."""
    shape, grid = writer.shape_in(op.name, CHANNELS_LAST[4]), writer.program.grid_of(op.name)
    strides, largest = writer.ints(1, *a.stride, 1), -1
    places = list(itertools.product(*map(range, a.kernel)))
    for count, place in enumerate(places, 1):
        begin = [i * gap for i, gap in zip(place, a.dilation, strict=True)]
        end = [b + (int(size) - 1) * step + 1 for b, size, step in zip(begin, shape[1:3], a.stride, strict=True)]
        seen = writer.tensor(shape, grid)
        inputs = [x, writer.ints(0, *begin, 0), writer.ints(0, *end, 0), strides]
        writer.op("STRIDED_SLICE", inputs, [seen], {"beginMask": OUTER, "endMask": OUTER})
        if largest >= 0:
            larger = result if count == len(places) else writer.tensor(shape, grid)
            writer.op("MAXIMUM", [largest, seen], [larger])
            seen = larger
        largest = seen


def _pad(writer: Writer, op: Op, a: PadAttrs) -> None:
    found, shape = writer.stored[op.inputs[0]], writer.program.values[op.inputs[0]].shape
    if a.mode == "constant":
        padding = np.array([a.padding[dim] for dim in found.order], np.int32)
        writer.op("PAD", [found.index, writer.constant(padding)], [writer.make(op.name, found.order)])
        return
    picks = {}
    for dim, (before, after) in enumerate(a.padding):
        if before or after:
            picks[dim] = _padded(int(shape[dim]), before, after, a.mode)
    _pick(writer, op, found, shape, picks)


def _padded(size: int, before: int, after: int, mode: str) -> Array:
    """Of each element of a padded dimension: which one of the `size` elements it is."""
    index = np.arange(-before, size + after)
    if mode == "reflect":
        index = (size - 1) - np.abs((size - 1) - np.abs(index))
    elif mode == "replicate":
        index = index.clip(0, size - 1)
    return np.asarray(index % size)


def _pick(writer: Writer, op: Op, found: Stored, shape: Sequence[int | str], picks: dict[int, Array]) -> None:
    """Adds gathers of elements along dimensions, one after the other."""
    x, sizes, grid = found.index, list(shape), writer.program.grid_of(op.name)
    for count, (dim, index) in enumerate(picks.items(), 1):
        sizes[dim] = len(index)
        if count == len(picks):
            result = writer.make(op.name, found.order)
        else:
            result = writer.tensor([sizes[d] for d in found.order], grid)
        indices = writer.constant(index.astype(np.int32))
        writer.op("GATHER", [x, indices], [result], {"axis": found.order.index(dim)})
        x = result


def _slice(writer: Writer, op: Op, a: SliceAttrs) -> None:
    found = writer.stored[op.inputs[0]]
    dim, shape = found.order.index(a.dim), writer.shape_in(op.inputs[0], found.order)
    out, rank = writer.shape_in(op.name, found.order), len(shape)
    result = writer.make(op.name, found.order)
    if a.step == 1:
        _cut(writer, found.index, result, rank, dim, a.start, int(out[dim]))
        return
    size, beside = shape[dim], shape[dim + 1] if dim + 1 < rank else 1
    if isinstance(size, int) and isinstance(beside, int) and a.start < a.step and size == int(out[dim]) * a.step:
        # Each element that is wanted stands, in the dimension behind, beside others that are not: the delegate splits,
        # and takes no steps.
        folded = [*shape[:dim], size // a.step, a.step * beside, *shape[dim + 2 :]]
        grid = writer.program.grid_of(op.name)
        wide = writer.tensor(folded, grid)
        writer.op("RESHAPE", [found.index, writer.ints(*sizes_of(folded))], [wide])
        cut = result
        if len(folded) != rank:
            cut = writer.tensor([*folded[:-1], 1], grid)
        part = [*folded[: dim + 1], beside, *folded[dim + 2 :]]
        parts = [cut if i == a.start else writer.tensor(part, grid) for i in range(a.step)]
        writer.op("SPLIT", [writer.constant(np.array(dim + 1, np.int32)), wide], parts, {"numSplits": a.step})
        if cut != result:
            writer.op("RESHAPE", [cut, writer.ints(*sizes_of(out))], [result])
        return
    begin, end, stride = [0] * rank, [0] * rank, [1] * rank
    begin[dim], end[dim], stride[dim] = a.start, a.start + (int(out[dim]) - 1) * a.step + 1, a.step
    whole = (1 << rank) - 1 - (1 << dim)
    inputs = [found.index, *(writer.ints(*part) for part in (begin, end, stride))]
    writer.op("STRIDED_SLICE", inputs, [result], {"beginMask": whole, "endMask": whole})


def _cut(writer: Writer, x: int, result: int, rank: int, dim: int, start: int, size: int) -> None:
    """Adds the op for `size` elements from `start` along a stored dimension."""
    begin, sizes = [0] * rank, [-1] * rank
    begin[dim], sizes[dim] = start, size
    writer.op("SLICE", [x, writer.ints(*begin), writer.ints(*sizes)], [result])


def _expand(writer: Writer, op: Op) -> None:
    program, name = writer.program, op.inputs[0]
    out, shape = program.values[op.name].shape, program.values[name].shape
    x, rank = writer.plain(name), len(out)
    full = (1,) * (rank - len(shape)) + tuple(shape)
    if len(full) != len(shape):
        wider = writer.tensor(full, program.grid_of(name))
        writer.op("RESHAPE", [x, writer.ints(*sizes_of(full))], [wider])
        x = wider
    picks = {
        dim: np.zeros(int(size), np.int64)
        for dim, size in enumerate(out)
        if isinstance(size, int) and full[dim] == 1 != size
    }
    if picks:
        _pick(writer, op, Stored(x, tuple(range(rank))), full, picks)
    else:
        writer.stored[op.name] = Stored(x, tuple(range(rank)))
