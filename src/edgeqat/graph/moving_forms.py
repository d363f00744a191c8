"""Integer forms of the ops that move elements and compute none."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from edgeqat.graph.form import Form, shape_of
from edgeqat.op_attrs import (
    PAD_MODES,
    ExpandAttrs,
    PadAttrs,
    PermuteAttrs,
    ResizeAttrs,
    SliceAttrs,
    ViewAttrs,
)
from edgeqat.program import Kind

__all__ = ["MOVING_FORMS"]

aten = torch.ops.aten


def _view(node: fx.Node, a: dict[str, Any]) -> Form | str:
    x = a.get("self", a.get("input"))
    sizes = [s if isinstance(s, int) else -1 for s in shape_of(node)]
    if sizes.count(-1) > 1:
        return f"more than one dimension of its result depends on the input's: {list(shape_of(node))}"
    return Form(Kind.VIEW, ViewAttrs(tuple(sizes)), (x,)) if isinstance(x, fx.Node) else "its input is no tensor"


def _permute(node: fx.Node, a: dict[str, Any]) -> Form | str:
    rank = len(shape_of(node))
    return Form(Kind.PERMUTE, PermuteAttrs(tuple(d % rank for d in a["dims"])), (a["self"],))


def _transpose(node: fx.Node, a: dict[str, Any]) -> Form | str:
    dims = list(range(len(shape_of(node))))
    i, j = a.get("dim0", a.get("axis0", 0)), a.get("dim1", a.get("axis1", 1))
    dims[i], dims[j] = dims[j], dims[i]
    return Form(Kind.PERMUTE, PermuteAttrs(tuple(dims)), (a["self"],))


def _slice(node: fx.Node, a: dict[str, Any]) -> Form | str:
    dim = a["dim"] % len(shape_of(node))
    start, stop = a["start"] if a["start"] is not None else 0, a["end"]
    size = shape_of(a["self"])[dim]
    if dim == 0 and not isinstance(size, int):
        return "it slices the batch"
    if not all(isinstance(v, int) or v is None for v in (start, stop, a["step"])):
        return "its bounds are computed"
    if not isinstance(size, int):  # bounds from the end stay so: where that is differs
        return Form(Kind.SLICE, SliceAttrs(dim, start, None if stop == 2**63 - 1 else stop, a["step"]), (a["self"],))
    start = start + size if start < 0 else start
    if stop is not None:
        stop = None if stop >= size else stop + size if stop < 0 else stop
    return Form(Kind.SLICE, SliceAttrs(dim, start, stop, a["step"]), (a["self"],))


def _pad(node: fx.Node, a: dict[str, Any]) -> Form | str:
    mode, value = a.get("mode", "constant"), a["value"]
    if mode not in PAD_MODES or (mode == "constant" and value is not None and value != 0):
        return f"it pads with mode {mode!r}, value {value}; wanted zeros or {', '.join(PAD_MODES[1:])}"
    rank, flat = len(shape_of(node)), list(a["pad"])
    if not all(isinstance(side, int) for side in flat):
        return "its padding is computed"
    if mode != "constant" and len(flat) != 2 * (rank - 2):
        return f"it pads {len(flat) // 2} of {rank} dimensions with mode {mode!r}, wanted all but batch and channels"
    pads = [(0, 0)] * rank
    for i in range(len(flat) // 2):
        pads[rank - 1 - i] = (flat[2 * i], flat[2 * i + 1])
    if min(min(p) for p in pads) < 0:
        return "it crops by negative padding"
    return Form(Kind.PAD, PadAttrs(tuple(pads), mode), (a["self"],))


def _expand(node: fx.Node, a: dict[str, Any]) -> Form | str:
    before, after = shape_of(a["self"]), shape_of(node)
    if len(before) != len(after):
        return f"it adds dimensions: {list(before)} to {list(after)}"
    fixed = [isinstance(size, int) for size in after]
    grows = [
        isinstance(b, int) and b == 1 and not (f and s == 1) for b, s, f in zip(before, after, fixed, strict=True)
    ]
    if any(g and not f for g, f in zip(grows, fixed, strict=True)):
        return "it repeats its input for each sample of the batch"
    sizes = [int(s) if g else -1 for g, s in zip(grows, after, strict=True)]
    return Form(Kind.EXPAND, ExpandAttrs(tuple(sizes)), (a["self"],))


def _resize(node: fx.Node, a: dict[str, Any]) -> Form | str:
    x = a.get("self", a.get("input"))
    assert isinstance(x, fx.Node)
    before, after = shape_of(x)[2:], shape_of(node)[2:]
    given = a.get("scale_factors")
    if given and all(float(factor).is_integer() for factor in given):
        return Form(Kind.RESIZE, ResizeAttrs(tuple(int(factor) for factor in given)), (x,))
    if any(not isinstance(b, int) or not isinstance(s, int) or s % b for b, s in zip(before, after, strict=True)):
        return f"it resizes {list(before)} to {list(after)}, wanted whole multiples"
    return Form(Kind.RESIZE, ResizeAttrs(tuple(s // b for b, s in zip(before, after, strict=True))), (x,))


MOVING_FORMS: Mapping[Any, Callable[[fx.Node, dict[str, Any]], Form | str]] = {
    aten.flatten.using_ints: _view,
    aten.unflatten.int: _view,
    aten.view.default: _view,
    aten.reshape.default: _view,
    aten._unsafe_view.default: _view,
    aten.squeeze.default: _view,
    aten.squeeze.dim: _view,
    aten.squeeze.dims: _view,
    aten.unsqueeze.default: _view,
    aten.contiguous.default: _view,
    aten.clone.default: _view,
    aten.permute.default: _permute,
    aten.transpose.int: _transpose,
    aten.swapaxes.default: _transpose,
    aten.t.default: _transpose,
    aten.slice.Tensor: _slice,
    aten.pad.default: _pad,
    aten.constant_pad_nd.default: _pad,
    aten.expand.default: _expand,
    aten.expand_as.default: _expand,
    aten.upsample_nearest1d.default: _resize,
    aten.upsample_nearest1d.vec: _resize,
    aten.upsample_nearest2d.default: _resize,
    aten.upsample_nearest2d.vec: _resize,
}
