"""What QConfigMapping knows a node by: its module, its op, and which one of that op it is."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from edgeqat.graph.capture import CapturedGraph
from edgeqat.graph.form import user_op
from edgeqat.graph.patterns import bare_op
from edgeqat.qconfig_mapping import LayerId

__all__ = ["layer_ids"]


def layer_ids(captured: CapturedGraph) -> Mapping[str, LayerId]:
    """The LayerId of every compute node, by the node's name.

    What one call of a library module computes shares an index, as torch.ao counts: a conv and its padding are one.
    """
    found: dict[str, LayerId] = {}
    seen: dict[tuple[str, str], dict[str, int]] = defaultdict(dict)
    for node in captured.graph.nodes:
        if node.name not in captured.origins:
            continue
        origin = captured.origins[node.name]
        # What the user wrote: silu is two ops by now, and both are that one.
        call, aten = user_op(node)
        op = bare_op(aten)
        layer = LayerId(origin.module, origin.type, op)
        # Of a module called twice, torch.export calls the second call `conv@1` in the keys of the stack.
        stack = list(node.meta.get("nn_module_stack") or {})
        call = str(stack[-1]) if layer.is_library and stack else call
        calls = seen[layer.parent, layer.kind]
        found[node.name] = LayerId(origin.module, origin.type, op, calls.setdefault(call, len(calls)))
    return found
