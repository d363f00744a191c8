"""Integer forms of the ops with weights, and of the batch norms behind them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from edgeqat.graph.form import Form, parameter_name, per_dim, shape_of
from edgeqat.op_attrs import ConvAttrs, ConvTransposeAttrs, LinearAttrs
from edgeqat.program import Kind

__all__ = ["WEIGHTED_FORMS"]

aten = torch.ops.aten


def _conv(node: fx.Node, a: dict[str, Any]) -> Form | str:
    weight, bias = parameter_name(a["weight"]), parameter_name(a["bias"])
    reason = _why_not(a) or _why_unbatched(a)
    if reason or weight is None:
        return reason
    rank = len(shape_of(a["weight"]))
    dims = rank - 2
    dilation = per_dim(a["dilation"], dims)
    if isinstance(a["padding"], str):
        kernel = shape_of(a["weight"])[2:]
        total = [d * (k - 1) if a["padding"] == "same" else 0 for d, k in zip(dilation, kernel, strict=True)]
        padding = tuple((t // 2, t - t // 2) for t in total)
    else:
        padding = tuple((p, p) for p in per_dim(a["padding"], dims))
    attrs = ConvAttrs(per_dim(a["stride"], dims), padding, dilation, a["groups"])
    return Form(Kind.CONV, attrs, (a["input"],), weight, bias)


def _conv_transpose(node: fx.Node, a: dict[str, Any]) -> Form | str:
    weight, bias = parameter_name(a["weight"]), parameter_name(a["bias"])
    reason = _why_not(a) or _why_unbatched(a)
    if reason or weight is None:
        return reason
    rank = len(shape_of(a["weight"]))
    if any(not isinstance(size, int) for size in shape_of(a["input"])[2:]):
        return "it is a transposed convolution of an open size"
    if a["groups"] != 1:
        return f"it is a transposed convolution of {a['groups']} groups, wanted 1"
    stride, padding, output_padding, dilation = (
        per_dim(a[key], rank - 2) for key in ("stride", "padding", "output_padding", "dilation")
    )
    attrs = ConvTransposeAttrs(stride, padding, output_padding, dilation)
    return Form(Kind.CONV_TRANSPOSE, attrs, (a["input"],), weight, bias)


def _why_not(a: dict[str, Any]) -> str:
    """Why what has these arguments has no weight and bias of its own, "" if it has."""
    computed = parameter_name(a["weight"]) is None or (a["bias"] is not None and parameter_name(a["bias"]) is None)
    return "its weight or bias is computed, not a parameter" if computed else ""


def _why_unbatched(a: dict[str, Any]) -> str:
    found, wanted = len(shape_of(a["input"])), len(shape_of(a["weight"]))
    if found == wanted:
        return ""
    return f"its input has {found} dimensions, wanted {wanted}: its first would be channels, not the batch"


def _linear(node: fx.Node, a: dict[str, Any]) -> Form | str:
    weight, bias = parameter_name(a["weight"]), parameter_name(a["bias"])
    reason = _why_not(a)
    if reason or weight is None:
        return reason
    if len(shape_of(a["input"])) < 2:
        return "its input has 1 dimension, wanted the batch in front"
    if sum(not isinstance(size, int) for size in shape_of(a["input"])[:-1]) > 1:
        return "more than one dimension of its input is open"
    return Form(Kind.LINEAR, LinearAttrs(), (a["input"],), weight, bias)


def _batch_norm(node: fx.Node, a: dict[str, Any]) -> Form | str:
    """Of those that are no module in the captured graph; `fuse` folds the others."""
    if a["running_mean"] is None:
        return "it normalises by the statistics of each batch"
    return "it is called as a function; nn.BatchNorm1d, 2d or 3d would be folded"


WEIGHTED_FORMS: Mapping[Any, Callable[[fx.Node, dict[str, Any]], Form | str]] = {
    aten.conv1d.default: _conv,
    aten.conv1d.padding: _conv,
    aten.conv2d.default: _conv,
    aten.conv2d.padding: _conv,
    aten.conv3d.default: _conv,
    aten.conv3d.padding: _conv,
    aten.conv_transpose1d.default: _conv_transpose,
    aten.conv_transpose2d.input: _conv_transpose,
    aten.conv_transpose3d.input: _conv_transpose,
    aten.linear.default: _linear,
    aten.batch_norm.default: _batch_norm,
}
