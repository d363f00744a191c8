"""Cutting a program into what runs inside XNNPACK and what does not, and spelling the former."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from edgeqat.lowering.shortcut import Shortcut, find_shortcuts
from edgeqat.lowering.xnnpack_graph import Graph, Located
from edgeqat.lowering.xnnpack_ops import spell_op
from edgeqat.lowering.xnnpack_shortcut import spell_shortcut
from edgeqat.program import Kind, Op, QuantizedProgram

__all__ = ["Delegate", "Part", "cut", "spell_part"]


@dataclass
class Part:
    """Successive ops that run in one place: in one XNNPACK graph, or each on its own outside."""

    inside: bool
    ops: list[Op] = field(default_factory=list)


@dataclass(frozen=True)
class Delegate:
    """A part as XNNPACK takes it.

    Attributes:
        data: The graph, serialized.
        constants: What it reads by name.
        inputs: Names of the values that it takes.
        outputs: What it gives, as it lies in memory.
        names: The values that each output stands for, one or more: a permutation moves nothing.
        located: Where each value that leaves it lies.
        nodes: How often each kind of node occurs.
    """

    data: bytes
    constants: Any
    inputs: tuple[str, ...]
    outputs: tuple[Located, ...]
    names: tuple[tuple[str, ...], ...]
    located: Mapping[str, Located]
    nodes: Mapping[str, int]


def cut(program: QuantizedProgram, nodes: frozenset[str]) -> list[Part]:
    """The parts of a program, in order; constants belong to each part that reads them.

    `nodes` names the tables that XNNPACK has a node for.
    """
    parts: list[Part] = []
    for op in program.ops:
        if op.kind is Kind.CONSTANT:
            continue
        inside = op.kind is not Kind.FLOAT and (op.kind is not Kind.LOOKUP or op.name in nodes)
        if not inside or not parts or not parts[-1].inside:
            parts.append(Part(inside))
        parts[-1].ops.append(op)
    return parts


def spell_part(
    program: QuantizedProgram, part: Part, outside: Mapping[str, Located], wanted: Sequence[str]
) -> Delegate:
    """One XNNPACK graph.

    Args:
        program: The program.
        part: A part that is inside.
        outside: Where each value that was made before lies.
        wanted: The values that others want of it.
    """
    graph = Graph()
    env: dict[str, Located] = {}
    inputs = tuple(dict.fromkeys(name for name in _reads(program, part) if name in outside))
    for name in inputs:
        env[name] = graph.input(outside[name])
    constants = {op.name: op for op in program.ops if op.kind is Kind.CONSTANT}
    shortcuts = find_shortcuts(part.ops)
    unread = _only_for(shortcuts, part, wanted)
    for op in part.ops:
        if op.name in unread:
            continue
        if op.name in shortcuts:
            shortcut = shortcuts[op.name]
            env[op.name] = spell_shortcut(graph, shortcut, env[shortcut.source], program.grid_of(op.name))
            continue
        for name in op.inputs:
            if name in constants and name not in env:
                env[name] = spell_op(graph, program, constants[name], [])
        env[op.name] = spell_op(graph, program, op, [env[name] for name in op.inputs])
    outputs: dict[int, Located] = {}
    names: dict[int, list[str]] = {}
    for name in wanted:
        number = env[name].id
        if number not in outputs:
            outputs[number] = env[name]
            graph.output(env[name])
        names.setdefault(number, []).append(name)
    data, store = graph.serialized()
    return Delegate(
        data,
        store,
        inputs,
        tuple(outputs.values()),
        tuple(tuple(found) for found in names.values()),
        {name: env[name] for name in wanted},
        Counter(graph.kinds()),
    )


def _only_for(shortcuts: Mapping[str, Shortcut], part: Part, wanted: Sequence[str]) -> set[str]:
    """The values inside shortcuts that nothing else reads."""
    inside = {name for found in shortcuts.values() for name in found.inside}
    others = {name for op in part.ops if op.name not in inside and op.name not in shortcuts for name in op.inputs}
    return inside - others - set(wanted)


def _reads(program: QuantizedProgram, part: Part) -> Iterator[str]:
    for op in part.ops:
        yield from op.inputs
