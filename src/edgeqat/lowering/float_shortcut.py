"""ResNet's shortcut without parameters in float islands, as one conv with weights of 0 and 1, see `shortcut.py`.

A delegate of convolutions is cut in pieces by a strided slice, in float as in integers; the float twin that an integer
file is compared with gets the same form. The results are the same: each sum is one product by 1, and zeros.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import fx
from torch.fx import GraphModule

from edgeqat.lowering.shortcut import Shortcut

__all__ = ["with_shortcut_convs"]

aten = torch.ops.aten
WHOLE = 2**63 - 1
"""How torch.export writes a slice's open end."""


def with_shortcut_convs(body: GraphModule) -> GraphModule:
    """The island itself where it has no shortcut, else a copy with a conv for each."""
    found = {node.name: shortcut for node in body.graph.nodes if (shortcut := _shortcut(node)) is not None}
    if not found:
        return body
    changed = copy.deepcopy(body)
    for node in list(changed.graph.nodes):
        if node.name not in found:
            continue
        source = next(other for other in changed.graph.nodes if other.name == found[node.name].source)
        name = f"{node.name}_weight"
        changed.register_buffer(name, found[node.name].weight(int(source.meta["val"].shape[1])).float())
        with changed.graph.inserting_before(node):
            weight = changed.graph.get_attr(name)
            args = (source, weight, None, list(found[node.name].stride))
            conv = changed.graph.call_function(aten.conv2d.default, args)
        conv.meta = dict(node.meta)
        node.replace_all_uses_with(conv)
        changed.graph.erase_node(node)
    changed.graph.eliminate_dead_code()
    changed.recompile()
    return changed


def _shortcut(node: fx.Node) -> Shortcut | None:
    """The shortcut that ends with a node, if it pads channels with zeros behind slices."""
    if node.target is not aten.pad.default or node.kwargs:
        return None
    source, sides, *how = node.args
    if how and (how[0] != "constant" or any(how[1:])):  # with another mode, or another number than zero
        return None
    if not isinstance(source, fx.Node) or not isinstance(sides, list) or len(sides) != 6 or any(sides[:4]):
        return None
    stride, inside = [1, 1], []
    while (step := _every_nth(source)) is not None:
        inside.append(source.name)
        stride[step[0] - 2] *= step[1]
        source = source.args[0]
        assert isinstance(source, fx.Node)
    front, behind = (int(side) for side in sides[4:])
    return Shortcut(source.name, tuple(inside), (stride[0], stride[1]), (front, behind)) if inside else None


def _every_nth(node: Any) -> tuple[int, int] | None:
    """(dimension, n) of a slice that takes every n-th row or column from the first on."""
    if node.target is not aten.slice.Tensor or len(node.args) != 5:
        return None
    _, dim, start, stop, step = node.args
    return (dim, step) if dim in (2, 3) and start == 0 and stop == WHOLE else None
