"""What each ATen op is in integers: from a node to its `Form`, or to the reason why it has none.

`FORMS` is the whole list of ops that may run in integers, `FLOAT_BY_DESIGN` that of ops that do not, with the reason.
An op in neither stays in float too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from edgeqat.graph.elementwise_forms import ELEMENTWISE_FORMS
from edgeqat.graph.form import Form, arguments, is_float32, op_name
from edgeqat.graph.moving_forms import MOVING_FORMS
from edgeqat.graph.pooling_forms import POOLING_FORMS
from edgeqat.graph.weighted_forms import WEIGHTED_FORMS
from edgeqat.program import Kind

__all__ = ["FLOAT_BY_DESIGN", "FORMS", "PROBABILITIES", "Form", "activation_of", "form_of"]

aten = torch.ops.aten

FORMS: Mapping[Any, Callable[[fx.Node, dict[str, Any]], Form | str]] = {
    **WEIGHTED_FORMS,
    **POOLING_FORMS,
    **ELEMENTWISE_FORMS,
    **MOVING_FORMS,
}

OWN_STATISTICS = "it normalises by the statistics of each sample, which need more than 8 bits"
BLENDS = "it blends neighbours with fractional weights"

FLOAT_BY_DESIGN: Mapping[Any, str] = {
    aten.softmax.int: "a row's exponentials span more than 8 bits",
    aten._softmax.default: "a row's exponentials span more than 8 bits",
    aten.log_softmax.int: "a row's exponentials span more than 8 bits",
    aten.layer_norm.default: OWN_STATISTICS,
    aten.group_norm.default: OWN_STATISTICS,
    aten.instance_norm.default: OWN_STATISTICS,
    aten.rms_norm.default: OWN_STATISTICS,
    aten.embedding.default: "it copies rows of float weights",
    aten.prelu.default: "its slopes are parameters, and a table would not follow them",
    aten.upsample_bilinear2d.default: BLENDS,
    aten.upsample_bilinear2d.vec: BLENDS,
    aten.upsample_bicubic2d.default: BLENDS,
    aten.upsample_bicubic2d.vec: BLENDS,
    aten.upsample_linear1d.default: BLENDS,
    aten.upsample_linear1d.vec: BLENDS,
    aten.scaled_dot_product_attention.default: "it drops out or masks inside one kernel",
}

PROBABILITIES = frozenset({aten.softmax.int, aten._softmax.default})
"""Float ops whose results lie between 0 and 1, as a sigmoid's do: what reads them in integers needs no calibration."""

TAKE_CONSTANTS = frozenset({Kind.ADD, Kind.MUL, Kind.MATMUL, Kind.CONCAT})
"""Kinds one of whose operands may be a parameter or buffer."""


def form_of(node: fx.Node) -> Form | str:
    """The integer form of `node`, or the reason why it has none."""
    handler = FORMS.get(node.target)
    if handler is None:
        return FLOAT_BY_DESIGN.get(node.target, f"{op_name(node.target)} has no integer form here")
    if not is_float32(node):
        return f"its result is {node.meta['val'].dtype}, not float32"
    form = handler(node, arguments(node))
    if isinstance(form, Form):
        constant = [source.op == "get_attr" for source in form.inputs]
        if all(constant) or (any(constant) and form.kind not in TAKE_CONSTANTS):
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
