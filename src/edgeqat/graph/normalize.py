"""Rewrites a captured graph into fewer kinds of ops, so that whatever has an integer form is found.

Ops that only move elements become slices, views, permutations and concatenations, exactly: split, chunk, unbind,
select, roll, stack, pixel shuffle. Pools over one dimension become pools over two. The difference of two values
becomes a sum. A batch norm that no conv stands before gets a depthwise 1x1 conv of ones, which absorbs it like any
other. Compound ops become what integer kernels compute: silu and hardswish a product with a (hard) sigmoid, attention
two matrix products around a softmax; these differ from torch's own kernels in the last bits of float32.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from edgeqat.graph.form import USER_OP, arguments, is_float32, is_tensor, per_dim, shape_of
from edgeqat.program import Origin

__all__ = ["normalize", "scale_of_norm"]

aten = torch.ops.aten

CONVS: Mapping[int, Any] = {3: aten.conv1d.default, 4: aten.conv2d.default, 5: aten.conv3d.default}
"""By the rank of the input."""

WEIGHTED = frozenset({*CONVS.values(), aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding}) | {
    aten.linear.default,
    aten.conv_transpose1d.default,
    aten.conv_transpose2d.input,
    aten.conv_transpose3d.input,
}


def normalize(graph: fx.Graph, root: nn.Module, origins: dict[str, Origin]) -> None:
    """Rewrites `graph` in place; `origins` gets an entry for each new node, `root` the weights of ones."""
    for node in graph.nodes:
        if node.name in origins:
            node.meta[USER_OP] = (node.name, origins[node.name].aten)
    for node in list(graph.nodes):
        rule = RULES.get(node.target) if node.op == "call_function" else None
        if rule is not None:
            rule(_Rewriter(graph, node, origins), arguments(node))
        elif node.op == "call_module":
            _lone_batch_norm(_Rewriter(graph, node, origins), root)
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))


def scale_of_norm(norm: str) -> str:
    """The name of the weight of ones that stands before a batch norm without a conv."""
    return f"{norm}_scale.weight"


class _Rewriter:
    """Writes nodes in front of one, which they replace; they come from the same module and line."""

    def __init__(self, graph: fx.Graph, node: fx.Node, origins: dict[str, Origin]) -> None:
        self.graph, self.node, self.origins = graph, node, origins

    def call(self, target: Any, *args: Any) -> fx.Node:
        with self.graph.inserting_before(self.node):
            made = self.graph.call_function(target, args)
        made.meta = dict(self.node.meta)
        values = fx.map_arg(args, lambda n: n.meta["val"])
        with self._mode():
            made.meta["val"] = target(*values)
        aten_name = str(target).removesuffix(".default")
        self.origins[made.name] = replace(self.origins[self.node.name], aten=aten_name)
        return made

    def _mode(self) -> Any:
        return next(n for n in self.node.all_input_nodes if is_tensor(n)).meta["val"].fake_mode

    def replace(self, old: fx.Node, new: fx.Node) -> None:
        old.replace_all_uses_with(new)

    def slice(self, x: fx.Node, dim: int, start: int, stop: int) -> fx.Node:
        return self.call(aten.slice.Tensor, x, dim, start, stop)


def _size(x: fx.Node, dim: int) -> int | None:
    """The size of a dimension, None where it depends on the batch."""
    size = shape_of(x)[dim]
    return size if isinstance(size, int) else None


def _parts(r: _Rewriter, x: fx.Node, dim: int, sizes: list[int], squeeze: bool = False) -> None:
    """Replaces the getitems of a node that cuts x into parts of these sizes."""
    for user in list(r.node.users):
        if user.target is not operator.getitem:
            return
    for user in list(r.node.users):
        i = user.args[1]
        assert isinstance(i, int)
        i %= len(sizes)
        start = sum(sizes[:i])
        part = r.slice(x, dim, start, start + sizes[i])
        r.replace(user, r.call(aten.squeeze.dim, part, dim) if squeeze else part)


def _split(r: _Rewriter, a: dict[str, Any]) -> None:
    x, dim = a["self"], a["dim"] % len(shape_of(a["self"]))
    size = _size(x, dim)
    if size is None:
        return
    given = a.get("split_size", a.get("split_sizes"))
    if given is None:  # chunk
        given = -(-size // a["chunks"])
    if isinstance(given, int):
        given = [min(given, size - start) for start in range(0, size, given)]
    _parts(r, x, dim, list(given))


def _unbind(r: _Rewriter, a: dict[str, Any]) -> None:
    x, dim = a["self"], a["dim"] % len(shape_of(a["self"]))
    size = _size(x, dim)
    if size is not None:
        _parts(r, x, dim, [1] * size, squeeze=True)


def _select(r: _Rewriter, a: dict[str, Any]) -> None:
    x, dim, index = a["self"], a["dim"] % len(shape_of(a["self"])), a["index"]
    size = _size(x, dim)
    if size is None or not isinstance(index, int):
        return
    index %= size
    r.replace(r.node, r.call(aten.squeeze.dim, r.slice(x, dim, index, index + 1), dim))


def _roll(r: _Rewriter, a: dict[str, Any]) -> None:
    x = a["self"]
    dims = [dim % len(shape_of(x)) for dim in a["dims"]]
    if not dims or any(_size(x, dim) is None for dim in dims):
        return
    for shift, dim in zip(a["shifts"], dims, strict=True):
        size = _size(x, dim)
        assert size is not None
        cut = size - shift % size
        if cut != size:
            x = r.call(aten.cat.default, [r.slice(x, dim, cut, size), r.slice(x, dim, 0, cut)], dim)
    r.replace(r.node, x)


def _stack(r: _Rewriter, a: dict[str, Any]) -> None:
    dim = a["dim"] % len(shape_of(r.node))
    if dim != 0:
        parts = [r.call(aten.unsqueeze.default, x, dim) for x in a["tensors"]]
        r.replace(r.node, r.call(aten.cat.default, parts, dim))


def _pixel_shuffle(r: _Rewriter, a: dict[str, Any]) -> None:
    x, f = a["self"], a["upscale_factor"]
    c, h, w = (_size(x, dim) for dim in (-3, -2, -1))
    if len(shape_of(x)) != 4 or c is None or h is None or w is None:
        return
    x = r.call(aten.reshape.default, x, [-1, c // f**2, f, f, h, w])
    x = r.call(aten.permute.default, x, [0, 1, 4, 2, 5, 3])
    r.replace(r.node, r.call(aten.reshape.default, x, [-1, c // f**2, h * f, w * f]))


def _pixel_unshuffle(r: _Rewriter, a: dict[str, Any]) -> None:
    x, f = a["self"], a["downscale_factor"]
    c, h, w = (_size(x, dim) for dim in (-3, -2, -1))
    if len(shape_of(x)) != 4 or c is None or h is None or w is None:
        return
    x = r.call(aten.reshape.default, x, [-1, c, h // f, f, w // f, f])
    x = r.call(aten.permute.default, x, [0, 1, 3, 5, 2, 4])
    r.replace(r.node, r.call(aten.reshape.default, x, [-1, c * f**2, h // f, w // f]))


def _channel_shuffle(r: _Rewriter, a: dict[str, Any]) -> None:
    x, groups = a["self"], a["groups"]
    sizes = [_size(x, dim) for dim in range(1, len(shape_of(x)))]
    if any(size is None for size in sizes):
        return
    c, *rest = [int(size) for size in sizes if size is not None]
    y = r.call(aten.reshape.default, x, [-1, groups, c // groups, *rest])
    y = r.call(aten.transpose.int, y, 1, 2)
    r.replace(r.node, r.call(aten.reshape.default, y, [-1, c, *rest]))


def _pool_of_one_dimension(target: Any, *keys: str) -> Callable[[_Rewriter, dict[str, Any]], None]:
    """The same pool over [N, C, 1, L]: its arguments get a first number for the new dimension."""
    first = {"kernel_size": 1, "stride": 1, "padding": 0, "dilation": 1, "output_size": 1}

    def rule(r: _Rewriter, a: dict[str, Any]) -> None:
        x = a["self"]
        if len(shape_of(x)) != 3:
            return
        args: list[Any] = []
        for key in keys:
            value = a[key]
            if key in first and value != []:
                value = [first[key], value if isinstance(value, int) else value[0]]
            args.append(value)
        pooled = r.call(target, r.call(aten.unsqueeze.default, x, 2), *args)
        r.replace(r.node, r.call(aten.squeeze.dim, pooled, 2))

    return rule


def _mean(r: _Rewriter, a: dict[str, Any]) -> None:
    """The mean over the last of three dimensions is one over a plane of height 1."""
    x = a["self"]
    if len(shape_of(x)) != 3 or a["dim"] is None or [d % 3 for d in a["dim"]] != [2] or a["dtype"] is not None:
        return
    mean = r.call(aten.mean.dim, r.call(aten.unsqueeze.default, x, 2), [2, 3], True)
    mean = r.call(aten.squeeze.dim, mean, 3)
    r.replace(r.node, mean if a["keepdim"] else r.call(aten.squeeze.dim, mean, 2))


def _avg_pool2d(r: _Rewriter, a: dict[str, Any]) -> None:
    """A divisor of one's own: the mean over whole windows, times their size by the divisor."""
    if a["divisor_override"] is None:
        return
    height, width = per_dim(a["kernel_size"])
    given = [a[key] for key in ("kernel_size", "stride", "padding", "ceil_mode")]
    mean = r.call(aten.avg_pool2d.default, a["self"], *given, True)
    r.replace(r.node, r.call(aten.mul.Tensor, mean, height * width / a["divisor_override"]))


def _sub(r: _Rewriter, a: dict[str, Any]) -> None:
    if a["alpha"] == 1 and is_tensor(a["other"]) and is_float32(a["other"]) and is_float32(a["self"]):
        r.replace(r.node, r.call(aten.add.Tensor, a["self"], r.call(aten.neg.default, a["other"])))


def _gated(gate: Any) -> Callable[[_Rewriter, dict[str, Any]], None]:
    """x * gate(x)."""

    def rule(r: _Rewriter, a: dict[str, Any]) -> None:
        r.replace(r.node, r.call(aten.mul.Tensor, a["self"], r.call(gate, a["self"])))

    return rule


def _attention(r: _Rewriter, a: dict[str, Any]) -> None:
    query, key, value, mask = a["query"], a["key"], a["value"], a["attn_mask"]
    if a["dropout_p"] or a["is_causal"] or a.get("enable_gqa"):
        return
    if mask is not None and not is_float32(mask):
        return
    scale = 1 / math.sqrt(shape_of(query)[-1]) if a["scale"] is None else a["scale"]
    scores = r.call(aten.matmul.default, query, r.call(aten.transpose.int, key, -2, -1))
    scores = r.call(aten.mul.Tensor, scores, scale)
    if mask is not None:
        scores = r.call(aten.add.Tensor, scores, mask)
    r.replace(r.node, r.call(aten.matmul.default, r.call(aten.softmax.int, scores, -1), value))


def _lone_batch_norm(r: _Rewriter, root: nn.Module) -> None:
    node, name = r.node, str(r.node.target)
    norm = root.get_submodule(name)
    x = node.all_input_nodes[0]
    if not isinstance(norm, _BatchNorm) or norm.running_var is None:
        return
    if x.target in WEIGHTED and len(x.users) == 1:  # fuse folds it, or says why not
        return
    calls = [n for n in r.graph.nodes if n.op == "call_module" and n.target == name]
    if len(calls) > 1:  # it would need one weight for all its calls
        return
    if len(shape_of(x)) == 2:  # a conv needs a dimension to go along
        x = r.call(aten.unsqueeze.default, x, 2)
        with r.graph.inserting_after(node):
            squeezed = r.graph.call_function(aten.squeeze.dim, (node, 2))
        squeezed.meta = dict(node.meta)
        r.origins[squeezed.name] = replace(r.origins[node.name], aten="aten.squeeze.dim")
        node.replace_all_uses_with(squeezed, lambda user: user is not squeezed)
        node.meta["val"] = x.meta["val"]
    channels, dims = norm.num_features, len(shape_of(x)) - 2
    holder = nn.Module()
    trained = norm.weight is not None and norm.weight.requires_grad
    ones = torch.ones(channels, 1, *[1] * dims, device=norm.running_var.device)
    holder.register_parameter("weight", nn.Parameter(ones, requires_grad=trained))
    path, _, leaf = scale_of_norm(name).removesuffix(".weight").rpartition(".")
    root.get_submodule(path).add_module(leaf, holder)
    with r.graph.inserting_before(node):
        weight = r.graph.get_attr(scale_of_norm(name))
    with r._mode():
        weight.meta["val"] = torch.ones(ones.shape)
    scaled = r.call(CONVS[dims + 2], x, weight, None, [1] * dims, [0] * dims, [1] * dims, channels)
    node.args = (scaled,)


RULES: Mapping[Any, Callable[[_Rewriter, dict[str, Any]], None]] = {
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split,
    aten.chunk.default: _split,
    aten.unbind.int: _unbind,
    aten.select.int: _select,
    aten.roll.default: _roll,
    aten.stack.default: _stack,
    aten.pixel_shuffle.default: _pixel_shuffle,
    aten.pixel_unshuffle.default: _pixel_unshuffle,
    aten.channel_shuffle.default: _channel_shuffle,
    aten.native_channel_shuffle.default: _channel_shuffle,
    aten.avg_pool1d.default: _pool_of_one_dimension(
        aten.avg_pool2d.default, "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad"
    ),
    aten.max_pool1d.default: _pool_of_one_dimension(
        aten.max_pool2d.default, "kernel_size", "stride", "padding", "dilation", "ceil_mode"
    ),
    aten.adaptive_avg_pool1d.default: _pool_of_one_dimension(aten.adaptive_avg_pool2d.default, "output_size"),
    aten.avg_pool2d.default: _avg_pool2d,
    aten.mean.dim: _mean,
    aten.sub.Tensor: _sub,
    aten.silu.default: _gated(aten.sigmoid.default),
    aten.hardswish.default: _gated(aten.hardsigmoid.default),
    aten.scaled_dot_product_attention.default: _attention,
}
