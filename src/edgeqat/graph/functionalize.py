"""In-place ops become their functional twins; guards, no-ops and assertions go."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import fx

from edgeqat.errors import CaptureError

__all__ = ["BATCH_NORMS", "make_functional", "source_line"]

aten = torch.ops.aten

BATCH_NORMS = frozenset({aten.batch_norm.default})

IN_PLACE = {
    aten.relu_.default: aten.relu.default,
    aten.hardtanh_.default: aten.hardtanh.default,
    aten.relu6_.default: aten.relu6.default,
    aten.add_.Tensor: aten.add.Tensor,
    aten.sub_.Tensor: aten.sub.Tensor,
    aten.mul_.Tensor: aten.mul.Tensor,
    aten.div_.Tensor: aten.div.Tensor,
    aten.silu_.default: aten.silu.default,
    aten.mish_.default: aten.mish.default,
    aten.hardswish_.default: aten.hardswish.default,
    aten.hardsigmoid_.default: aten.hardsigmoid.default,
    aten.leaky_relu_.default: aten.leaky_relu.default,
    aten.elu_.default: aten.elu.default,
    aten.selu_.default: aten.selu.default,
    aten.celu_.default: aten.celu.default,
    aten.sigmoid_.default: aten.sigmoid.default,
    aten.tanh_.default: aten.tanh.default,
    aten.neg_.default: aten.neg.default,
    aten.abs_.default: aten.abs.default,
    aten.exp_.default: aten.exp.default,
    aten.dropout_.default: aten.dropout.default,
    aten.clamp_.default: aten.clamp.default,
    aten.clamp_min_.default: aten.clamp_min.default,
    aten.clamp_max_.default: aten.clamp_max.default,
    aten.masked_fill_.Scalar: aten.masked_fill.Scalar,
    aten.masked_fill_.Tensor: aten.masked_fill.Tensor,
}

NO_OPS = frozenset({aten.alias.default, aten.detach.default, aten.detach_.default, aten.lift_fresh_copy.default})


def make_functional(graph: fx.Graph) -> None:
    """Turns in-place ops into functional ones and drops guards, no-ops and assertions."""
    position = {node: i for i, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        if node.op == "call_module" or (node.op == "call_function" and "_assert" in str(node.target)):
            graph.erase_node(node)  # export's guard on the inputs' sizes: our own check replaces it
        elif node.target in NO_OPS or _slices_nothing(node) or _pads_nothing(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif node.target in IN_PLACE:
            changed = node.args[0]
            # What reads the tensor after it was changed must read the result.
            changed.replace_all_uses_with(node, lambda user, n=node: position[user] > position[n])
            node.target = IN_PLACE[node.target]
        elif node.op == "call_function" and _mutates(node.target):
            raise CaptureError(
                f"found the in-place op {node.target} at {source_line(node)}, wanted a functional one: "
                "write the assignment out of place"
            )


def _slices_nothing(node: fx.Node) -> bool:
    """Whether a node is the x[:] that torch.export writes for every dimension left alone."""
    if node.target is not aten.slice.Tensor:
        return False
    _, _, start, stop, *step = node.args
    return start in (None, 0) and stop in (None, 2**63 - 1) and step in ([], [1])


def _pads_nothing(node: fx.Node) -> bool:
    """Whether a node is the padding by zero elements of a conv with a padding_mode and no padding."""
    pads: Any = node.args[1] if node.target is aten.pad.default else None
    return pads is not None and not any(pads)


def _mutates(target: Any) -> bool:
    schema = getattr(target, "_schema", None)
    return schema is not None and schema.is_mutable and target not in BATCH_NORMS


def source_line(node: fx.Node) -> str:
    """The user's line that a node comes from, "file.py:12"; "" where it is not known."""
    frames = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    own = [f for f in frames if "/torch/" not in f[0]] or frames
    return f"{own[-1][0].rsplit('/', 1)[-1]}:{own[-1][1]}" if own else ""
