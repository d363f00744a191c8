"""What each ATen op is in integers: one function per op, from a node to its `Form`, or to the reason why not.

The table `FORMS` is the whole list. An op that is not in it stays in float.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from edgeqat.program import (
    PAD_MODES,
    AddAttrs,
    Attrs,
    AveragePoolAttrs,
    ConvAttrs,
    Kind,
    LinearAttrs,
    MaxPoolAttrs,
    PadAttrs,
    PermuteAttrs,
    SliceAttrs,
    ViewAttrs,
)

__all__ = ["FORMS", "Form", "activation_of", "form_of"]

aten = torch.ops.aten


@dataclass(frozen=True)
class Form:
    """The integer form of one ATen node.

    Attributes:
        kind: What it is in a program.
        attrs: Its attributes.
        inputs: The nodes whose values it reads.
        weight: Dotted name of its weight parameter.
        bias: Dotted name of its bias parameter.
    """

    kind: Kind
    attrs: Attrs
    inputs: tuple[fx.Node, ...]
    weight: str | None = None
    bias: str | None = None


def form_of(node: fx.Node) -> Form | str:
    """The integer form of `node`, or the reason why it has none."""
    handler = FORMS.get(node.target)
    if handler is None:
        return f"{_op_name(node)} has no integer form here"
    if not _is_float32(node):
        return f"its result is {node.meta['val'].dtype}, not float32"
    form = handler(node, _arguments(node))
    if isinstance(form, Form) and any(source.op == "get_attr" for source in form.inputs):
        return "it acts on a parameter, buffer or constant"
    return form


def activation_of(node: fx.Node) -> str | None:
    """ "relu" or "relu6" if `node` is that function of its one input, under any of its ATen names."""
    if node.op != "call_function":
        return None
    if node.target is aten.relu.default:
        return "relu"
    if node.target is aten.relu6.default:
        return "relu6"
    if node.target in (aten.hardtanh.default, aten.clamp.default):
        low, high = ([*node.args[1:], *node.kwargs.values(), None, None])[:2]
        if low == 0 and high == 6:
            return "relu6"
        if low == 0 and high is None and node.target is aten.clamp.default:
            return "relu"
    if node.target is aten.clamp_min.default and node.args[1] == 0:
        return "relu"
    return None


def _op_name(node: fx.Node) -> str:
    return str(node.target).removesuffix(".default").removesuffix(".input")


def _arguments(node: fx.Node) -> dict[str, Any]:
    """A node's arguments by their schema name, defaults filled in."""
    schema = node.target._schema  # type: ignore[union-attr]
    values = {a.name: a.default_value for a in schema.arguments}
    values.update(zip((a.name for a in schema.arguments), node.args, strict=False))
    values.update(node.kwargs)
    return values


def _is_float32(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dtype == torch.float32


def _parameter(item: Any) -> str | None:
    return str(item.target) if isinstance(item, fx.Node) and item.op == "get_attr" else None


def _per_dim(value: Any, n: int = 2) -> tuple[int, ...]:
    """An argument for each of n spatial dimensions, of which ATen also takes one for all."""
    return (value,) * n if isinstance(value, int) else tuple(value) if len(value) == n else (value[0],) * n


def _conv(node: fx.Node, a: dict[str, Any]) -> Form | str:
    weight, bias = _parameter(a["weight"]), _parameter(a["bias"])
    if weight is None or (a["bias"] is not None and bias is None):
        return "its weight or bias is computed, not a parameter"
    rank, found = a["weight"].meta["val"].dim(), a["input"].meta["val"].dim()
    if found != rank:
        return f"its input has {found} dimensions, wanted {rank}: its first would be channels, not the batch"
    dims = rank - 2
    dilation = _per_dim(a["dilation"], dims)
    if isinstance(a["padding"], str):
        kernel = a["weight"].meta["val"].shape[2:]
        total = [d * (k - 1) if a["padding"] == "same" else 0 for d, k in zip(dilation, kernel, strict=True)]
        padding = tuple((t // 2, t - t // 2) for t in total)
    else:
        padding = tuple((p, p) for p in _per_dim(a["padding"], dims))
    attrs = ConvAttrs(_per_dim(a["stride"], dims), padding, dilation, a["groups"])
    return Form(Kind.CONV, attrs, (a["input"],), weight, bias)


def _conv_transpose(node: fx.Node, a: dict[str, Any]) -> Form | str:
    return f"{_op_name(node)} has no integer form here: ONNX Runtime has no kernel for it"


def _batch_norm(node: fx.Node, a: dict[str, Any]) -> Form | str:
    """Of those that are no module in the captured graph; `fuse` folds the others."""
    if a["running_mean"] is None:
        return "it normalises by the statistics of each batch"
    return "it is called as a function; nn.BatchNorm1d, 2d or 3d would be folded"


def _linear(node: fx.Node, a: dict[str, Any]) -> Form | str:
    weight, bias = _parameter(a["weight"]), _parameter(a["bias"])
    if weight is None or (a["bias"] is not None and bias is None):
        return "its weight or bias is computed, not a parameter"
    if a["input"].meta["val"].dim() != 2:
        return f"its input has {a['input'].meta['val'].dim()} dimensions, wanted 2"
    return Form(Kind.LINEAR, LinearAttrs(), (a["input"],), weight, bias)


def _add(node: fx.Node, a: dict[str, Any]) -> Form | str:
    left, right = a["self"], a["other"]
    for side in (left, right):
        if not isinstance(side, fx.Node) or not isinstance(side.meta.get("val"), Tensor):
            return "it adds a number"
        if side.op == "get_attr":
            return "it adds a parameter or buffer"
        if side.meta["val"].shape != node.meta["val"].shape or not _is_float32(side):
            return "its operands differ in shape or type"
    if a["alpha"] != 1:
        return f"its alpha is {a['alpha']}, wanted 1"
    return Form(Kind.ADD, AddAttrs(), (left, right))


def _adaptive_avg_pool2d(node: fx.Node, a: dict[str, Any]) -> Form | str:
    x = a["self"]
    size, out = tuple(x.meta["val"].shape[2:]), _per_dim(a["output_size"])
    if x.meta["val"].dim() != 4:
        return "its input is not [N, C, H, W]"
    if out == (1, 1):
        return Form(Kind.AVERAGE_POOL, AveragePoolAttrs(), (x,))
    if any(not isinstance(s, int) or s % o for s, o in zip(size, out, strict=True)):
        return f"its windows differ in size: {size} to {out}"
    kernel = tuple(s // o for s, o in zip(size, out, strict=True))
    return Form(Kind.AVERAGE_POOL, AveragePoolAttrs(kernel, kernel, (0, 0)), (x,))


def _mean(node: fx.Node, a: dict[str, Any]) -> Form | str:
    x = a["self"]
    rank = x.meta["val"].dim()
    dims = sorted(d % rank for d in a["dim"] or range(rank))
    if rank != 4 or dims != [2, 3]:
        return f"it averages dimensions {dims} of {rank}, wanted [2, 3] of 4"
    return Form(Kind.AVERAGE_POOL, AveragePoolAttrs(), (x,))


def _avg_pool2d(node: fx.Node, a: dict[str, Any]) -> Form | str:
    kernel = _per_dim(a["kernel_size"])
    if a["divisor_override"] is not None:
        return "it overrides the divisor"
    stride, padding = _per_dim(a["stride"]) if a["stride"] else kernel, _per_dim(a["padding"])
    sizes = a["self"].meta["val"].shape[2:]
    if a["ceil_mode"] and any((s + 2 * p - k) % t for s, p, k, t in zip(sizes, padding, kernel, stride, strict=True)):
        # PyTorch and ONNX count the elements of a window that hangs over the edge differently.
        return "ceil_mode lets its last windows hang over the edge"
    attrs = AveragePoolAttrs(kernel, stride, padding, a["count_include_pad"])
    return Form(Kind.AVERAGE_POOL, attrs, (a["self"],))


def _max_pool2d(node: fx.Node, a: dict[str, Any]) -> Form | str:
    kernel = _per_dim(a["kernel_size"])
    stride = _per_dim(a["stride"]) if a["stride"] else kernel
    attrs = MaxPoolAttrs(kernel, stride, _per_dim(a["padding"]), _per_dim(a["dilation"]), a["ceil_mode"])
    return Form(Kind.MAX_POOL, attrs, (a["self"],))


def _view(node: fx.Node, a: dict[str, Any]) -> Form | str:
    x = a.get("self", a.get("input"))
    sizes = [s if isinstance(s, int) else -1 for s in node.meta["val"].shape]
    if sizes.count(-1) > 1:
        return f"more than one dimension of its result depends on the batch: {list(node.meta['val'].shape)}"
    return Form(Kind.VIEW, ViewAttrs(tuple(sizes)), (x,)) if isinstance(x, fx.Node) else "its input is no tensor"


def _permute(node: fx.Node, a: dict[str, Any]) -> Form | str:
    rank = node.meta["val"].dim()
    return Form(Kind.PERMUTE, PermuteAttrs(tuple(d % rank for d in a["dims"])), (a["self"],))


def _transpose(node: fx.Node, a: dict[str, Any]) -> Form | str:
    dims = list(range(node.meta["val"].dim()))
    i, j = a["dim0"], a["dim1"]
    dims[i], dims[j] = dims[j], dims[i]
    return Form(Kind.PERMUTE, PermuteAttrs(tuple(dims)), (a["self"],))


def _slice(node: fx.Node, a: dict[str, Any]) -> Form | str:
    dim = a["dim"] % node.meta["val"].dim()
    start, stop = a["start"] if a["start"] is not None else 0, a["end"]
    if dim == 0:
        return "it slices the batch"
    if not all(isinstance(v, int) or v is None for v in (start, stop, a["step"])):
        return "its bounds are computed"
    size = a["self"].meta["val"].shape[dim]
    start = start + size if start < 0 else start
    if stop is not None:
        stop = None if stop >= size else stop + size if stop < 0 else stop
    return Form(Kind.SLICE, SliceAttrs(dim, start, stop, a["step"]), (a["self"],))


def _pad(node: fx.Node, a: dict[str, Any]) -> Form | str:
    mode, value = a.get("mode", "constant"), a["value"]
    if mode not in PAD_MODES or (mode == "constant" and value is not None and value != 0):
        return f"it pads with mode {mode!r}, value {value}; wanted zeros or {', '.join(PAD_MODES[1:])}"
    rank, flat = node.meta["val"].dim(), list(a["pad"])
    if mode != "constant" and len(flat) != 2 * (rank - 2):
        return f"it pads {len(flat) // 2} of {rank} dimensions with mode {mode!r}, wanted all but batch and channels"
    pads = [(0, 0)] * rank
    for i in range(len(flat) // 2):
        pads[rank - 1 - i] = (flat[2 * i], flat[2 * i + 1])
    if min(min(p) for p in pads) < 0:
        return "it crops by negative padding"
    return Form(Kind.PAD, PadAttrs(tuple(pads), mode), (a["self"],))


FORMS: Mapping[Any, Callable[[fx.Node, dict[str, Any]], Form | str]] = {
    aten.conv1d.default: _conv,
    aten.conv1d.padding: _conv,
    aten.conv2d.default: _conv,
    aten.conv2d.padding: _conv,
    aten.conv3d.default: _conv,
    aten.conv3d.padding: _conv,
    aten.conv_transpose1d.default: _conv_transpose,
    aten.conv_transpose2d.input: _conv_transpose,
    aten.conv_transpose3d.input: _conv_transpose,
    aten.batch_norm.default: _batch_norm,
    aten.linear.default: _linear,
    aten.add.Tensor: _add,
    aten.adaptive_avg_pool2d.default: _adaptive_avg_pool2d,
    aten.mean.dim: _mean,
    aten.avg_pool2d.default: _avg_pool2d,
    aten.max_pool2d.default: _max_pool2d,
    aten.flatten.using_ints: _view,
    aten.view.default: _view,
    aten.reshape.default: _view,
    aten.squeeze.dim: _view,
    aten.squeeze.dims: _view,
    aten.unsqueeze.default: _view,
    aten.contiguous.default: _view,
    aten.permute.default: _permute,
    aten.transpose.int: _transpose,
    aten.slice.Tensor: _slice,
    aten.pad.default: _pad,
    aten.constant_pad_nd.default: _pad,
}
