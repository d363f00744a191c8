"""Integer forms of ops on elements: sums, products, concatenation, matrix products, functions of one element."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from edgeqat.graph.form import Form, is_float32, is_tensor, shape_of
from edgeqat.op_attrs import AddAttrs, ClampAttrs, ConcatAttrs, LookupAttrs, MatmulAttrs, MulAttrs
from edgeqat.program import Kind

__all__ = ["ELEMENTWISE_FORMS"]

aten = torch.ops.aten

Handler = Callable[[fx.Node, dict[str, Any]], "Form | str"]


def _lookup(x: fx.Node, function: str, *arguments: Any) -> Form | str:
    if not is_tensor(x) or not is_float32(x):
        return f"its input is {x.meta['val'].dtype if is_tensor(x) else 'no tensor'}, wanted float32"
    if not all(isinstance(v, (int, float)) for v in arguments):
        return "one of its numbers depends on the input's size"
    return Form(Kind.LOOKUP, LookupAttrs(function, tuple(float(v) for v in arguments)), (x,))


def _operands(left: Any, right: Any) -> str:
    """Why two operands are not two float32 tensors, "" if they are."""
    for side in (left, right):
        if not is_tensor(side):
            return "one of its operands is a size"
        if not is_float32(side):
            return f"one of its operands is {side.meta['val'].dtype}, wanted float32"
    return ""


def _add(node: fx.Node, a: dict[str, Any]) -> Form | str:
    left, right = a["self"], a["other"]
    if a["alpha"] != 1:
        return f"its alpha is {a['alpha']}, wanted 1"
    if isinstance(right, (int, float)):
        return _lookup(left, "shift", right)
    return _operands(left, right) or Form(Kind.ADD, AddAttrs(), (left, right))


def _sub(node: fx.Node, a: dict[str, Any]) -> Form | str:
    if isinstance(a["other"], (int, float)) and a["alpha"] == 1:
        return _lookup(a["self"], "shift", -a["other"])
    return f"its alpha is {a['alpha']}, wanted 1"  # of two tensors it is an addition by now


def _rsub(node: fx.Node, a: dict[str, Any]) -> Form | str:
    if a["alpha"] != 1:
        return f"its alpha is {a['alpha']}, wanted 1"
    return _lookup(a["self"], "subtract_from", a["other"])


def _mul(node: fx.Node, a: dict[str, Any]) -> Form | str:
    left, right = a["self"], a["other"]
    if isinstance(right, (int, float)):
        return _lookup(left, "scale", right)
    return _operands(left, right) or Form(Kind.MUL, MulAttrs(), (left, right))


def _div(node: fx.Node, a: dict[str, Any]) -> Form | str:
    if isinstance(a["other"], (int, float)):
        return _lookup(a["self"], "divide", a["other"])
    return "it divides one value by another"


def _matmul(node: fx.Node, a: dict[str, Any]) -> Form | str:
    left, right = a["self"], a.get("other", a.get("mat2"))
    reason = _operands(left, right)
    if reason:
        return reason
    assert isinstance(right, fx.Node)
    if min(len(shape_of(left)), len(shape_of(right))) < 2:
        return "one of its operands is a vector, wanted matrices"
    return Form(Kind.MATMUL, MatmulAttrs(), (left, right))


def _cat(node: fx.Node, a: dict[str, Any]) -> Form | str:
    rank = len(shape_of(node))
    for x in a["tensors"]:
        if len(shape_of(x)) != rank or not is_float32(x):
            return "its operands differ in rank or type"
    if not all(isinstance(shape_of(x)[a["dim"] % rank], int) for x in a["tensors"]):
        return "it concatenates along the batch"
    return Form(Kind.CONCAT, ConcatAttrs(a["dim"] % rank), tuple(a["tensors"]))


def _relu(node: fx.Node, a: dict[str, Any]) -> Form | str:
    return Form(Kind.CLAMP, ClampAttrs(), (a["self"],))


def _clamp(node: fx.Node, a: dict[str, Any]) -> Form | str:
    low, high = a.get("min", a.get("min_val")), a.get("max", a.get("max_val"))
    if low == 0 and high is None:
        return _relu(node, a)
    if isinstance(low, fx.Node) or isinstance(high, fx.Node):
        return "its bounds are computed"
    return _lookup(a["self"], "clamp", -torch.inf if low is None else low, torch.inf if high is None else high)


SELU = (1.6732632423543772848170429916717, 1.0507009873554804934193349852946, 1.0)
"""alpha, scale and gain of an elu that is a selu (Klambauer et al. 2017, arXiv:1706.02515)."""


def _gelu(node: fx.Node, a: dict[str, Any]) -> Form | str:
    return _lookup(a["self"], "gelu_tanh" if a["approximate"] == "tanh" else "gelu")


def _softplus(node: fx.Node, a: dict[str, Any]) -> Form | str:
    if (a["beta"], a["threshold"]) != (1, 20):
        return f"its beta and threshold are {a['beta']} and {a['threshold']}, wanted 1 and 20"
    return _lookup(a["self"], "softplus")


def _pow(node: fx.Node, a: dict[str, Any]) -> Form | str:
    return _lookup(a["self"], "square") if a["exponent"] == 2 else f"its exponent is {a['exponent']}, wanted 2"


def _plain(function: str, *names: str) -> Handler:
    """The handler of a function whose arguments stand in the schema under these names."""

    def handler(node: fx.Node, a: dict[str, Any]) -> Form | str:
        return _lookup(a["self"], function, *(a[name] for name in names))

    return handler


ELEMENTWISE_FORMS: Mapping[Any, Handler] = {
    aten.add.Tensor: _add,
    aten.add.Scalar: _add,
    aten.sub.Tensor: _sub,
    aten.sub.Scalar: _sub,
    aten.rsub.Scalar: _rsub,
    aten.mul.Tensor: _mul,
    aten.mul.Scalar: _mul,
    aten.div.Tensor: _div,
    aten.div.Scalar: _div,
    aten.matmul.default: _matmul,
    aten.bmm.default: _matmul,
    aten.mm.default: _matmul,
    aten.cat.default: _cat,
    aten.relu.default: _relu,
    aten.clamp_min.default: _clamp,
    aten.clamp_max.default: _clamp,
    aten.clamp.default: _clamp,
    aten.hardtanh.default: _clamp,
    aten.relu6.default: lambda node, a: _lookup(a["self"], "clamp", 0.0, 6.0),
    aten.sigmoid.default: _plain("sigmoid"),
    aten.hardsigmoid.default: _plain("hardsigmoid"),
    aten.tanh.default: _plain("tanh"),
    aten.leaky_relu.default: _plain("leaky_relu", "negative_slope"),
    aten.elu.default: _plain("elu", "alpha", "scale", "input_scale"),
    aten.selu.default: lambda node, a: _lookup(a["self"], "elu", *SELU),
    aten.celu.default: lambda node, a: _lookup(a["self"], "elu", a["alpha"], 1.0, 1 / a["alpha"]),
    aten.gelu.default: _gelu,
    aten.mish.default: _plain("mish"),
    aten.softplus.default: _softplus,
    aten.neg.default: _plain("neg"),
    aten.abs.default: _plain("abs"),
    aten.exp.default: _plain("exp"),
    aten.pow.Tensor_Scalar: _pow,
    aten.square.default: _plain("square"),
}
