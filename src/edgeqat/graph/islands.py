"""A float island: nodes that stay in float, exported as one module of their own."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from edgeqat.graph.capture import CapturedGraph
from edgeqat.graph.submodules import owner_of

__all__ = ["build_island", "island_inputs"]


def island_inputs(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """The tensor nodes that an island of `nodes` reads from outside, in order of first use."""
    inside = set(nodes)
    found: dict[fx.Node, None] = {}
    seen: set[fx.Node] = set()

    def visit(node: fx.Node) -> None:
        for source in node.all_input_nodes:
            if source in inside or source in seen or source.op == "get_attr":
                continue
            seen.add(source)
            if isinstance(source.meta.get("val"), Tensor):
                found.setdefault(source)
            else:
                visit(source)  # a size: computed inside the island, from the tensor that it is the size of

    for node in nodes:
        visit(node)
    return list(found)


def build_island(
    captured: CapturedGraph, nodes: Sequence[fx.Node], inputs: Sequence[fx.Node], outputs: Sequence[fx.Node]
) -> fx.GraphModule:
    """A module that computes `outputs` from `inputs` by `nodes`, in eval mode, with copies of their parameters.

    Parameters and submodules keep the names they have in the user's model.
    """
    root, graph = nn.Module(), fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for i, node in enumerate(inputs):
        env[node] = graph.placeholder(f"input_{i}")
        env[node].meta = dict(node.meta)

    def emit(node: fx.Node) -> fx.Node:
        if node not in env:
            if node.op == "get_attr":
                _copy_attribute(captured.root, root, str(node.target))
            elif node.op == "call_module":
                owner, leaf = owner_of(root, str(node.target))
                owner.add_module(leaf, copy.deepcopy(captured.root.get_submodule(str(node.target))))
            for source in node.all_input_nodes:
                emit(source)
            env[node] = graph.node_copy(node, lambda n: env[n])
        return env[node]

    for node in nodes:
        emit(node)
    graph.output(tuple(emit(node) for node in outputs))
    return fx.GraphModule(root, graph).eval()


def _copy_attribute(source: nn.Module, root: nn.Module, name: str) -> None:
    owner, leaf = owner_of(root, name)
    tensor: Any = source.get_submodule(name.rpartition(".")[0])
    tensor = getattr(tensor, leaf)
    if isinstance(tensor, nn.Parameter):
        owner.register_parameter(leaf, nn.Parameter(tensor.detach().clone(), requires_grad=False))
    else:
        owner.register_buffer(leaf, torch.as_tensor(tensor).detach().clone())
