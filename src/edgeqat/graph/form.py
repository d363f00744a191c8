"""The integer form of one captured node, and how to read a node's arguments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from edgeqat.op_attrs import Attrs
from edgeqat.program import Kind

__all__ = [
    "USER_OP",
    "Form",
    "arguments",
    "is_float32",
    "is_tensor",
    "op_name",
    "parameter_name",
    "per_dim",
    "shape_of",
    "user_op",
]

USER_OP = "edgeqat_user_op"
"""Key of a node's `meta` for what `user_op` returns; a rewriting copies `meta` from the node that it replaces."""


@dataclass(frozen=True)
class Form:
    """The integer form of one ATen node.

    Attributes:
        kind: What it is in a program.
        attrs: Its attributes.
        inputs: The nodes whose values it reads; a get_attr node is an operand that does not change with the input.
        weight: Dotted name of its weight parameter.
        bias: Dotted name of its bias parameter.
    """

    kind: Kind
    attrs: Attrs
    inputs: tuple[fx.Node, ...]
    weight: str | None = None
    bias: str | None = None

    @property
    def channel_axis(self) -> int:
        """The dimension of the weight that holds the output channels."""
        return 1 if self.kind is Kind.CONV_TRANSPOSE else 0


def op_name(target: Any) -> str:
    """`aten.add.Tensor` or `aten.relu`, as messages name an op."""
    return str(target).removesuffix(".default").removesuffix(".input").removesuffix(".int").removesuffix(".vec")


def arguments(node: fx.Node) -> dict[str, Any]:
    """A node's arguments by their schema name, defaults filled in."""
    schema = node.target._schema  # type: ignore[union-attr]
    values = {a.name: a.default_value for a in schema.arguments}
    values.update(zip((a.name for a in schema.arguments), node.args, strict=False))
    values.update(node.kwargs)
    return values


def is_tensor(item: Any) -> bool:
    """Whether an argument is a node that computes a tensor."""
    return isinstance(item, fx.Node) and isinstance(item.meta.get("val"), Tensor)


def is_float32(node: fx.Node) -> bool:
    """Whether a node computes a float32 tensor."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dtype == torch.float32


def shape_of(node: fx.Node) -> torch.Size:
    """A tensor node's shape; sizes that depend on the batch are symbols."""
    shape: torch.Size = node.meta["val"].shape
    return shape


def user_op(node: fx.Node) -> tuple[str, str]:
    """(identity, ATen name) of the op of the user's that a compute node is, or is part of since it was rewritten."""
    found: tuple[str, str] = node.meta[USER_OP]
    return found


def parameter_name(item: Any) -> str | None:
    """The dotted name of a parameter or buffer, None for whatever else."""
    return str(item.target) if isinstance(item, fx.Node) and item.op == "get_attr" else None


def per_dim(value: Any, n: int = 2) -> tuple[int, ...]:
    """An argument for each of n spatial dimensions, of which ATen also takes one for all."""
    return (value,) * n if isinstance(value, int) else tuple(value) if len(value) == n else (value[0],) * n
