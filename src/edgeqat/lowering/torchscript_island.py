"""Float islands in TorchScript: those that compute with the batch's size are compiled, since tracing would fix it."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import torch
from torch import fx, nn

from edgeqat.errors import EdgeqatError
from edgeqat.graph.opaque import is_opaque
from edgeqat.graph.submodules import owner_of
from edgeqat.program import Op

__all__ = ["traceable_island"]

aten = torch.ops.aten

PLACEMENT = frozenset({"device", "layout", "pin_memory"})
"""Arguments that say where a new tensor lies: here on the CPU, and TorchScript cannot read fx's spelling of them."""


def traceable_island(op: Op) -> nn.Module:
    """The body of a float op in a form that may be traced with one batch and run with any.

    In a trace, a size that is read is a constant: the batch of the example.

    Raises:
        EdgeqatError: TorchScript cannot compile an island that reads the batch's size, or an opaque module.
    """
    assert op.body is not None
    body = _with_compiled(op.body)
    if not any(node.target is aten.sym_size.int for node in body.graph.nodes):
        return body
    graph = fx.Graph()
    output = graph.graph_copy(body.graph, {})
    graph.output(output)
    for node in list(graph.nodes):
        _respell(graph, node)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch announces that TorchScript will go
            return torch.jit.script(fx.GraphModule(body, graph).eval())
    except Exception as error:
        # The compiler raises whatever it stumbles over; the user needs to know which ops.
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        ops = ", ".join(sorted({o.aten for o in op.origins}))
        raise EdgeqatError(
            f"TorchScript cannot compile the float ops {ops}, which read the batch's size: {lines[0]}; "
            "write them without it, such as with -1 in a view, or lower to onnxruntime"
        ) from error


def _with_compiled(body: fx.GraphModule) -> fx.GraphModule:
    """An island whose opaque modules are compiled: their control flow depends on data, and a trace keeps one branch.

    Raises:
        EdgeqatError: TorchScript cannot compile one.
    """
    called = {str(node.target) for node in body.graph.nodes if node.op == "call_module"}
    opaque = {name for name in called if is_opaque(body.get_submodule(name))}
    if not opaque:
        return body
    own = copy.deepcopy(body)
    for name in sorted(opaque):
        module = own.get_submodule(name)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch announces that TorchScript will go
                compiled = torch.jit.script(module)
        except Exception as error:
            # The compiler raises whatever it stumbles over.
            reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise EdgeqatError(
                f"TorchScript cannot hold the opaque {name} ({type(module).__name__}): torch.jit.script says "
                f"{reason}; rewrite it so that torch.jit.script takes it"
            ) from error
        owner, leaf = owner_of(own, name)
        owner.add_module(leaf, compiled)
    return own


def _respell(graph: fx.Graph, node: fx.Node) -> None:
    """A node of torch.export's vocabulary in words that TorchScript knows."""
    if node.op != "call_function":
        return
    if node.target is aten.sym_size.int:
        node.target = aten.size
    elif isinstance(node.target, torch._ops.OpOverload):
        node.target = node.target.overloadpacket
        node.kwargs = {name: value for name, value in node.kwargs.items() if name not in PLACEMENT}

    def spelled(argument: Any) -> Any:
        if isinstance(argument, float) and not math.isfinite(argument):
            with graph.inserting_before(node):
                return graph.call_function(float, (str(argument),))
        return argument

    node.args, node.kwargs = fx.node.map_aggregate((node.args, node.kwargs), spelled)
