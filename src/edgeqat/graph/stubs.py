"""QuantStub and DeQuantStub leave no node in an exported graph; while capturing, these custom ops stand in.

On the copy that is exported every stub's forward becomes a custom op, which marks where the user wants the
quantized region to begin and end. The marks vanish again in `strip_stubs`, which says which nodes lie outside.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, fx, nn

__all__ = ["mark_stubs", "strip_stubs"]

OUTSIDE_BEFORE = "it stands before the QuantStub"
OUTSIDE_AFTER = "it stands after the DeQuantStub"


# A custom op may not return its input, so the marks return clones; they are removed before anything runs.
@torch.library.custom_op("edgeqat::quant_stub", mutates_args=())
def _quant_stub(x: Tensor) -> Tensor:
    return x.clone()


@_quant_stub.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("edgeqat::dequant_stub", mutates_args=())
def _dequant_stub(x: Tensor) -> Tensor:
    return x.clone()


@_dequant_stub.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class _QuantMark(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.edgeqat.quant_stub(x)  # type: ignore[no-any-return]


class _DeQuantMark(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.edgeqat.dequant_stub(x)  # type: ignore[no-any-return]


def mark_stubs(model: nn.Module, opaque: Iterable[nn.Module] = ()) -> None:
    """Replaces every QuantStub and DeQuantStub below `model`, in place, by its mark; not inside opaque submodules."""
    from torch.ao.quantization import DeQuantStub, QuantStub

    inside = {id(module) for kept in opaque for module in kept.modules()}
    for parent in [module for module in model.modules() if id(module) not in inside]:
        for name, child in list(parent.named_children()):
            if isinstance(child, QuantStub):
                setattr(parent, name, _QuantMark())
            elif isinstance(child, DeQuantStub):
                setattr(parent, name, _DeQuantMark())


def strip_stubs(graph: fx.Graph) -> dict[str, str]:
    """Removes the marks from `graph`, in place.

    Returns:
        The nodes outside the region that the stubs bound, by name, each with the reason why it stays in float.
        Empty where the model has no QuantStub: then nothing is outside.
    """
    marks = {torch.ops.edgeqat.quant_stub.default: True, torch.ops.edgeqat.dequant_stub.default: False}
    found = [node for node in graph.nodes if node.target in marks]
    outside: dict[str, str] = {}
    if any(marks[node.target] for node in found):
        inside: dict[fx.Node, bool] = {}
        ended: set[fx.Node] = set()
        for node in graph.nodes:
            sources = [n for n in node.all_input_nodes if n.op not in ("get_attr",)]
            if node.target in marks:
                inside[node] = marks[node.target]
                if not marks[node.target]:
                    ended.add(node)
            elif node.op in ("call_function", "call_module"):
                inside[node] = bool(sources) and all(inside.get(n, False) for n in sources)
                if any(n in ended for n in sources):
                    ended.add(node)
                if not inside[node]:
                    outside[node.name] = OUTSIDE_AFTER if node in ended else OUTSIDE_BEFORE
            else:
                inside[node] = False
    for node in found:
        node.replace_all_uses_with(node.args[0])
        graph.erase_node(node)
    return outside
