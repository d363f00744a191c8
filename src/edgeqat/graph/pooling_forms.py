"""Integer forms of pools and means over planes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from edgeqat.graph.form import Form, per_dim, shape_of
from edgeqat.op_attrs import AveragePoolAttrs, MaxPoolAttrs
from edgeqat.program import Kind

__all__ = ["POOLING_FORMS"]

aten = torch.ops.aten


def _adaptive_avg_pool2d(node: fx.Node, a: dict[str, Any]) -> Form | str:
    x = a["self"]
    size, out = tuple(shape_of(x)[2:]), per_dim(a["output_size"])
    if len(shape_of(x)) != 4:
        return "its input is not [N, C, H, W]"
    if out == (1, 1):
        return Form(Kind.AVERAGE_POOL, AveragePoolAttrs(), (x,))
    if any(not isinstance(s, int) or s % o for s, o in zip(size, out, strict=True)):
        return f"its windows differ in size: {size} to {out}"
    kernel = tuple(s // o for s, o in zip(size, out, strict=True))
    return Form(Kind.AVERAGE_POOL, AveragePoolAttrs(kernel, kernel, (0, 0)), (x,))


def _mean(node: fx.Node, a: dict[str, Any]) -> Form | str:
    x = a["self"]
    rank = len(shape_of(x))
    dims = sorted(d % rank for d in a["dim"] or range(rank))
    if rank != 4 or dims != [2, 3]:
        return f"it averages dimensions {dims} of {rank}, wanted [2, 3] of 4"
    return Form(Kind.AVERAGE_POOL, AveragePoolAttrs(), (x,))


def _avg_pool2d(node: fx.Node, a: dict[str, Any]) -> Form | str:
    kernel = per_dim(a["kernel_size"])
    stride, padding = per_dim(a["stride"]) if a["stride"] else kernel, per_dim(a["padding"])
    sizes = shape_of(a["self"])[2:]
    if a["ceil_mode"] and any(
        not isinstance(s, int) or (s + 2 * p - k) % t
        for s, p, k, t in zip(sizes, padding, kernel, stride, strict=True)
    ):
        # PyTorch and ONNX count the elements of a window that hangs over the edge differently.
        return "ceil_mode lets its last windows hang over the edge"
    attrs = AveragePoolAttrs(kernel, stride, padding, a["count_include_pad"])
    return Form(Kind.AVERAGE_POOL, attrs, (a["self"],))


def _max_pool2d(node: fx.Node, a: dict[str, Any]) -> Form | str:
    kernel = per_dim(a["kernel_size"])
    stride = per_dim(a["stride"]) if a["stride"] else kernel
    attrs = MaxPoolAttrs(kernel, stride, per_dim(a["padding"]), per_dim(a["dilation"]), a["ceil_mode"])
    return Form(Kind.MAX_POOL, attrs, (a["self"],))


POOLING_FORMS: Mapping[Any, Callable[[fx.Node, dict[str, Any]], Form | str]] = {
    aten.adaptive_avg_pool2d.default: _adaptive_avg_pool2d,
    aten.mean.dim: _mean,
    aten.avg_pool2d.default: _avg_pool2d,
    aten.max_pool2d.default: _max_pool2d,
}
