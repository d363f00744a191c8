"""Fusion: nodes that one integer op computes become one region, wherever they sit in the user's modules.

    conv | transposed conv | linear  [+ batch norm]  [+ relu | relu6]
    add | mul | concat                               [+ relu | relu6]

as the table `BUILT_IN` of `patterns` says. The batch norm is folded into the weights (`fold_bn`), the activation
becomes the clamp of the output's grid. A node joins a region only if nobody else reads what it would hide; otherwise
the refusal says who does. The regions of a block that a user's pattern matches become a group (`groups`).
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from edgeqat.errors import PlanError
from edgeqat.graph.capture import CapturedGraph
from edgeqat.graph.form import parameter_name
from edgeqat.graph.forms import Form, activation_of, form_of
from edgeqat.graph.groups import Block, Group, find_blocks, is_compute
from edgeqat.graph.normalize import scale_of_norm
from edgeqat.graph.opaque import OPAQUE_REASON, is_opaque
from edgeqat.graph.patterns import Fusion, Refusal, bare_op, built_in_after, lists_of, patterns_of
from edgeqat.graph.pixels import NormalisePixels
from edgeqat.op_attrs import LookupAttrs
from edgeqat.program import Kind, Origin

__all__ = ["FusedGraph", "Refusal", "Region", "fuse"]


@dataclass(frozen=True, eq=False)
class Region:
    """Nodes that stand or fall together: one integer op, or one op left in float.

    Attributes:
        name: Unique, after the module that its anchor belongs to.
        nodes: In order.
        form: Integer form of the anchor; None where there is none.
        batch_norm: Folded batch norm node.
        activation: Fused activation node.
        reason: Why there is no integer form.
        origins: Of each node.
        identity: True for dropout: nothing in eval mode, so only simulation keeps it.
        group: The block of a user's pattern that it belongs to.
    """

    name: str
    nodes: tuple[fx.Node, ...]
    form: Form | None
    batch_norm: fx.Node | None
    activation: fx.Node | None
    reason: str
    origins: tuple[Origin, ...]
    identity: bool = False
    group: Group | None = None

    @property
    def anchor(self) -> fx.Node:
        """The conv, linear, add, ... node."""
        return self.nodes[0]

    @property
    def outputs(self) -> tuple[fx.Node, ...]:
        """The nodes that others read: the last, or every getitem of an op with several outputs."""
        items = tuple(n for n in self.nodes if n.target is operator.getitem)
        return items if items else (self.nodes[-1],)


@dataclass(frozen=True, eq=False)
class FusedGraph:
    """A captured graph partitioned into regions, in execution order, with what was not fused."""

    captured: CapturedGraph
    regions: tuple[Region, ...]
    refusals: tuple[Refusal, ...]

    def __deepcopy__(self, memo: dict[int, Any]) -> FusedGraph:
        return self  # nothing changes it

    def normalises(self, region: Region) -> bool:
        """Whether a region is what makes normalised images of pixels."""
        node = region.anchor
        found = self.captured.root.get_submodule(str(node.target)) if node.op == "call_module" else None
        return isinstance(found, NormalisePixels)

    @property
    def groups(self) -> tuple[Group, ...]:
        """The blocks of the user's patterns."""
        return tuple(dict.fromkeys(r.group for r in self.regions if r.group is not None))

    def folded(self) -> list[str]:
        """Dotted names of the batch norms that a region can fold."""
        return [str(r.batch_norm.target) for r in self.regions if r.batch_norm is not None]


def fuse(
    captured: CapturedGraph, fusions: Sequence[Fusion] = (), refusals_so_far: Sequence[Refusal] = ()
) -> FusedGraph:
    """Partitions a captured graph into regions.

    Args:
        captured: The graph.
        fusions: Patterns, whose blocks become groups of regions; and lists of module names that must end up in one
            region, as in torch's `fuse_modules`. The built-in patterns are applied with or without them; a list that
            they do not cover is an error that says why.
        refusals_so_far: What was refused before capture.

    Raises:
        PlanError: A list names a module that is not in the graph, or that cannot be fused; a pattern matches nothing.
    """
    lists = lists_of(fusions)
    refusals = list(refusals_so_far)
    taken: set[fx.Node] = set()
    regions: list[Region] = []
    names = _Names(captured.signature.inputs)
    position = {node: i for i, node in enumerate(captured.graph.nodes)}
    readers: Counter[str] = Counter()
    for node in captured.graph.nodes:
        if node.op == "get_attr":
            readers[str(node.target)] += len(node.users)
    for node in position:
        if node in taken or not is_compute(node):
            continue
        region = _grow(captured, node, position, readers, refusals, names)
        taken.update(region.nodes)
        regions.append(region)
    regions.sort(key=lambda r: position[r.nodes[-1]])
    blocks, refused = find_blocks(captured, patterns_of(fusions))
    refusals += refused
    regions = _grouped(regions, blocks, refusals)
    fused = FusedGraph(captured, tuple(regions), tuple(dict.fromkeys(refusals)))
    for names_of_one in lists:
        _require(fused, names_of_one)
    return fused


def _grouped(regions: Sequence[Region], blocks: Sequence[Block], refusals: list[Refusal]) -> list[Region]:
    """The regions, those of each block with their group; a region that holds any op of a block belongs to it."""
    grouped = list(regions)
    index = {node: i for i, region in enumerate(grouped) for node in region.nodes}
    for block in blocks:
        group, found = block.group, sorted({index[node] for node in block.nodes})
        taken = next((other for i in found if (other := grouped[i].group) is not None), None)
        if taken is not None:
            reason = f"not grouped as {group.pattern}: some of its ops belong to {taken.describe()}"
            refusals.append(Refusal(group.name, reason))
            continue
        for i in found:
            origins = tuple(replace(origin, group=group.describe()) for origin in grouped[i].origins)
            grouped[i] = replace(grouped[i], origins=origins, group=group)
    return grouped


class _Names:
    """Hands out unique names."""

    def __init__(self, taken: Iterable[str]) -> None:
        self._taken = set(taken)
        self._next: dict[str, int] = {}

    def unique(self, wanted: str) -> str:
        # Names are never given back, so the search goes on where it ended: a root may hold hundreds of additions.
        name, i = wanted, self._next.get(wanted, 1)
        while name in self._taken:
            name, i = f"{wanted}_{i}", i + 1
        self._taken.add(name)
        self._next[wanted] = i
        return name


def _grow(
    captured: CapturedGraph,
    node: fx.Node,
    position: Mapping[fx.Node, int],
    readers: Mapping[str, int],
    refusals: list[Refusal],
    names: _Names,
) -> Region:
    origin = captured.origins[node.name]
    op = bare_op(origin.aten)
    # A library module (Conv2d) lends its name to what it computes; in a user's module the op is named too. So is the
    # padding that a conv with padding_mode="reflect" does before it.
    known = hasattr(nn, origin.type) and origin.module and not (op == "pad" and origin.type.startswith("Conv"))
    name = names.unique(origin.module if known else f"{origin.module}.{op}".lstrip("."))
    if node.op == "call_module":
        module = captured.root.get_submodule(str(node.target))
        if isinstance(module, nn.modules.dropout._DropoutNd):
            return Region(name, (node,), None, None, None, "", (origin,), identity=True)
        if isinstance(module, NormalisePixels):
            return Region(name, (node,), None, None, None, "", (origin,))  # planning says why
        if not is_opaque(module):
            return Region(name, (node,), None, None, None, _why_not_folded(node, refusals), (origin,))
    if isinstance(node.meta.get("val"), (tuple, list)):
        items = sorted(node.users, key=position.__getitem__)
        reason = f"{origin.aten} has several outputs and no integer form here"
        reason = OPAQUE_REASON if node.op == "call_module" else reason
        return Region(name, (node, *items), None, None, None, reason, (origin,))
    if node.op == "call_module":
        return Region(name, (node,), None, None, None, OPAQUE_REASON, (origin,))
    form = form_of(node)
    if isinstance(form, str):
        return Region(name, (node,), None, None, None, form, (origin,))
    nodes, batch_norm, activation = [node], None, None
    chain = [] if isinstance(form.attrs, LookupAttrs) else [op]  # an addition of a number is a table
    if "batch_norm" in built_in_after(*chain):
        batch_norm = _foldable_batch_norm(captured, name, node, form, readers, refusals)
        nodes += [batch_norm] if batch_norm is not None else []
        chain += ["batch_norm"] if batch_norm is not None else []
    if "relu" in built_in_after(*chain):
        activation = _fusable_activation(name, nodes[-1], refusals)
        if activation is not None:
            nodes.append(activation)
            attrs: Any = form.attrs  # of those that have an activation
            form = replace(form, attrs=replace(attrs, activation=activation_of(activation)))
    origins = tuple(captured.origins[n.name] for n in nodes)
    return Region(name, tuple(nodes), form, batch_norm, activation, "", origins)


def _why_not_folded(node: fx.Node, refusals: list[Refusal]) -> str:
    for refusal in refusals:
        if refusal.name == node.target:
            return refusal.reason
    return f"not folded: {node.all_input_nodes[0].name} before it is no conv or linear with an integer form"


def _foldable_batch_norm(
    captured: CapturedGraph,
    name: str,
    node: fx.Node,
    form: Form,
    readers: Mapping[str, int],
    refusals: list[Refusal],
) -> fx.Node | None:
    found = [user for user in node.users if _batch_norm(captured, user) is not None]
    refusals += _read_by_others(name, node)
    if not found:
        return None
    if form.kind is Kind.LINEAR and node.meta["val"].dim() != 2:
        refusals.append(Refusal(str(found[0].target), f"not folded into {name}: it normalises another dimension"))
        return None
    if len(node.users) > 1:
        others = ", ".join(user.name for user in node.users if user is not found[0])
        refusals.append(Refusal(str(found[0].target), f"not folded into {name}, which {others} reads too"))
        return None
    module = _batch_norm(captured, found[0])
    assert module is not None
    for parameter in filter(None, (form.weight, form.bias)):
        if readers[parameter] > 1:
            refusals.append(Refusal(str(found[0].target), f"not folded: {parameter} is used more than once"))
            return None
    return found[0]


def _read_by_others(name: str, node: fx.Node) -> list[Refusal]:
    """A batch norm that reads a conv which others read too: by now it has a depthwise conv of its own."""
    found = []
    for user in node.users:
        norms = [str(n.target) for n in user.users if n.op == "call_module"]
        weight = parameter_name(user.args[1]) if len(user.args) > 1 else None
        if norms and weight == scale_of_norm(norms[0]):
            others = ", ".join(other.name for other in node.users if other is not user)
            found.append(Refusal(norms[0], f"not folded into {name}, which {others} reads too"))
    return found


def _batch_norm(captured: CapturedGraph, node: fx.Node) -> _BatchNorm | None:
    if node.op != "call_module":
        return None
    module = captured.root.get_submodule(str(node.target))
    return module if isinstance(module, _BatchNorm) else None


def _fusable_activation(name: str, node: fx.Node, refusals: list[Refusal]) -> fx.Node | None:
    found = [user for user in node.users if activation_of(user) is not None]
    if not found:
        return None
    if len(node.users) > 1:
        others = ", ".join(user.name for user in node.users if user is not found[0])
        refusals.append(Refusal(found[0].name, f"not fused with {name}, which {others} reads too"))
        return None
    return found[0]


def _require(fused: FusedGraph, group: list[str]) -> None:
    """Checks that the modules of `group` are in one region."""
    known = {o.module for region in fused.regions for o in region.origins}
    missing = [name for name in group if name not in known]
    if missing:
        raise PlanError(f"fusion {group}: found no module {missing[0]!r} in the model; wanted names such as conv1")
    for region in fused.regions:
        if set(group) <= {o.module for o in region.origins}:
            return
    why = [f"{r.name} {r.reason}" for r in fused.refusals if r.name in group]
    raise PlanError(
        f"fusion {group}: these modules are not one conv or linear, batch norm and activation in a row"
        + (f" ({'; '.join(why)})" if why else "")
    )
