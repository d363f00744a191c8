"""Finding the blocks of fusion patterns in a captured graph: what runs in integers as a whole, or not at all.

A block is found as the user wrote it: by calls of modules, or by ops as they were before `normalize` rewrote them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, fx, nn

from edgeqat.errors import PlanError
from edgeqat.graph.capture import CapturedGraph, innermost_module
from edgeqat.graph.form import is_tensor, user_op
from edgeqat.graph.islands import island_inputs
from edgeqat.graph.patterns import FusionMatch, FusionPattern, Refusal, ask, bare_op, did_you_mean, is_class

__all__ = ["Block", "Group", "find_blocks", "is_compute"]


@dataclass(frozen=True, eq=False)
class Group:
    """What the regions of one block have in common.

    Attributes:
        pattern: Name of its pattern.
        name: Dotted name of the block; of a sequence, the name of its first module or op.
        module: Dotted name of the innermost module that holds it, whose QConfig it has.
        type: That module's class name.
    """

    pattern: str
    name: str
    module: str
    type: str

    def describe(self) -> str:
        """`layer1.0.se (squeeze-excite)`."""
        return f"{self.name or '<model>'} ({self.pattern})"


@dataclass(frozen=True, eq=False)
class Block:
    """The compute nodes of a group, in order."""

    group: Group
    nodes: tuple[fx.Node, ...]


def find_blocks(captured: CapturedGraph, patterns: Sequence[FusionPattern]) -> tuple[list[Block], list[Refusal]]:
    """The blocks of each pattern, in the order of the patterns, and what was refused.

    Patterns with `replace` have done their work before capture, and are passed over.

    Raises:
        PlanError: A pattern matches nothing, or its check fails.
    """
    finder = _Finder(captured)
    blocks: list[Block] = []
    refusals: list[Refusal] = []
    for pattern in patterns:
        if pattern.replace is not None:
            continue
        refused: list[Refusal] = []
        found = list(finder.chains(pattern, refused))
        if not found and not refused:
            raise PlanError(f"fusion pattern {pattern.name!r} matches nothing: {finder.why_nothing(pattern)}")
        for chain in found:
            block, match = finder.block(pattern, chain)
            reason = ask(pattern, match)
            if reason:
                refused.append(Refusal(block.group.name, f"refused by the check of {pattern.name}: {reason}"))
            else:
                blocks.append(block)
        refusals += refused
    return blocks, refusals


def is_compute(node: fx.Node) -> bool:
    """Whether a node makes tensors. Sizes and other numbers are computed where they are used."""
    if node.op == "call_module":
        return True
    value = node.meta.get("val")
    return node.op == "call_function" and (isinstance(value, (Tensor, tuple, list)))


@dataclass(eq=False)
class _Unit:
    """One call of a module, or one op of the user's: a step of a chain. `name` is a module's or a node's."""

    name: str
    nodes: dict[fx.Node, None]


Step = Callable[[fx.Node], "list[_Unit]"]
"""The units of one kind that a node belongs to, the outermost first."""


class _Finder:
    """Looks for chains in one graph."""

    def __init__(self, captured: CapturedGraph) -> None:
        self.captured = captured
        self.modules: dict[str, nn.Module] = dict(captured.template.named_modules(remove_duplicate=False))
        self.nodes = [node for node in captured.graph.nodes if is_compute(node)]
        self.calls: dict[str, _Unit] = {}
        self.ops: dict[str, _Unit] = {}
        self.op_name: dict[str, str] = {}
        for node in self.nodes:
            for key, path in self._stack(node):
                self.calls.setdefault(key, _Unit(path, {})).nodes[node] = None
            op, aten = user_op(node)
            self.ops.setdefault(op, _Unit(op, {})).nodes[node] = None
            self.op_name[op] = bare_op(aten)

    def chains(self, pattern: FusionPattern, refused: list[Refusal]) -> Iterator[list[_Unit]]:
        """Every place where a pattern fits; a place that has another reader is refused."""
        steps = self._steps(pattern)
        began: dict[_Unit, None] = {}
        for node in self.nodes:
            began.update(dict.fromkeys(steps[0](node)))
        for unit in began:
            chain = [unit]
            for step in steps[1:]:
                following = self._following(chain, step, pattern, refused)
                if following is None:
                    break
                chain.append(following)
            else:
                yield chain

    def block(self, pattern: FusionPattern, chain: Sequence[_Unit]) -> tuple[Block, FusionMatch]:
        """The block of a chain, and what the pattern's check is asked about."""
        inside = {node for unit in chain for node in unit.nodes}
        if pattern.ops is None:
            first, paths = chain[0].name, [unit.name for unit in chain]
            modules = [name for name in self.modules if any(_is_below(name, path) for path in paths)]
        else:
            first = self._name_of_op(chain[0])
            paths = modules = list(dict.fromkeys(innermost_module(node) for unit in chain for node in unit.nodes))
        holder = _common(paths)
        group = Group(pattern.name, first, holder, type(self.modules[holder]).__name__)
        block = Block(group, tuple(node for node in self.nodes if node in inside))
        read = [node for node in block.nodes if any(user not in inside for user in node.users)]
        match = FusionMatch(
            pattern.name,
            first,
            {name: self.modules[name] for name in modules},
            tuple(self.captured.shape_of(node) for node in island_inputs(block.nodes)),
            tuple(self.captured.shape_of(node) for node in read if is_tensor(node)),
        )
        return block, match

    def _name_of_op(self, op: _Unit) -> str:
        """A library module lends its name to what it computes, as to a region; in a user's module it is the op's."""
        path = innermost_module(next(iter(op.nodes)))
        if path and hasattr(nn, type(self.modules[path]).__name__):
            return path
        return f"{path}.{op.name}".lstrip(".")

    def why_nothing(self, pattern: FusionPattern) -> str:
        """Why there is no match, with the nearest names."""
        if pattern.ops is not None:
            known, wanted = set(self.op_name.values()), pattern.steps
            absent = next((sorted(step) for step in wanted if not step & known), None)
        else:
            known = {type(module).__name__ for module in self.modules.values()}
            absent = next(([_name(c)] for c in pattern.classes if not self._instances(c)), None)
        if absent is not None:
            return f"the model has no {' or '.join(absent)}; {did_you_mean(absent, known)}"
        steps = list(pattern.ops) if pattern.ops is not None else [_name(cls) for cls in pattern.classes]
        if len(steps) == 1:
            return f"no {steps[0]} of the model computes anything when it is called"
        return f"nowhere do {', '.join(steps)} follow one another, each the only reader of the one before"

    def _stack(self, node: fx.Node) -> Iterator[tuple[str, str]]:
        """(key of the call, module name) of each module that a node is computed in, the outermost first."""
        for key, (path, _) in (node.meta.get("nn_module_stack") or {}).items():
            name = path.partition("@")[0]
            if name in self.modules:
                yield key, name

    def _steps(self, pattern: FusionPattern) -> list[Step]:
        def op(names: frozenset[str]) -> Step:
            return lambda node: [self.ops[o] for o in [user_op(node)[0]] if self.op_name[o] in names]

        def call(cls: type[nn.Module] | str) -> Step:
            return lambda node: [self.calls[k] for k, n in self._stack(node) if is_class(self.modules[n], cls)]

        return [op(names) for names in pattern.steps] or [call(cls) for cls in pattern.classes]

    def _following(
        self, chain: Sequence[_Unit], step: Step, pattern: FusionPattern, refused: list[Refusal]
    ) -> _Unit | None:
        """What alone reads the last unit of a chain, if it is of the kind that the next step wants."""
        last = chain[-1]
        inside = {node for unit in chain for node in unit.nodes}
        readers = [n for n in _readers(last.nodes) if n not in last.nodes]
        following: dict[_Unit, None] = {}
        for reader in readers:
            units = step(reader) if is_compute(reader) else []
            following.update(dict.fromkeys(u for u in units if not inside & u.nodes.keys()))
        for unit in following:
            if all(reader in unit.nodes for reader in readers):
                return unit
        if following:
            next_unit = next(iter(following))
            others = ", ".join(reader.name for reader in readers if reader not in next_unit.nodes)
            reason = f"not grouped as {pattern.name}: {others} reads it too, not {next_unit.name} alone"
            refused.append(Refusal(last.name, reason))
        return None

    def _instances(self, cls: type[nn.Module] | str) -> list[str]:
        return [name for name, module in self.modules.items() if is_class(module, cls)]


def _readers(nodes: Iterable[fx.Node]) -> list[fx.Node]:
    """What reads the values of nodes, the output included; a size is read by nobody, whoever computes with it."""
    users = dict.fromkeys(user for node in nodes for user in node.users)
    return [user for user in users if is_compute(user) or user.op == "output"]


def _common(paths: Sequence[str]) -> str:
    """The innermost module that holds all of these."""
    first, *rest = [path.split(".") if path else [] for path in paths]
    n = 0
    while n < len(first) and all(path[: n + 1] == first[: n + 1] for path in rest):
        n += 1
    return ".".join(first[:n])


def _is_below(name: str, module: str) -> bool:
    return not module or name == module or name.startswith(f"{module}.")


def _name(cls: type[nn.Module] | str) -> str:
    return cls if isinstance(cls, str) else cls.__name__
