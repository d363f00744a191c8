"""Hashes of a program: of what was decided, and of the grids that calibration and training found.

Both replace names by their order, so that one model written in two ways has the same hashes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch.fx import GraphModule

from edgeqat.program import Const, Grid, Op, Value

__all__ = ["hash_grids", "hash_plan"]


def hash_grids(
    ops: Sequence[Op], values: Mapping[str, Value], consts: Mapping[str, Const], inputs: Sequence[str]
) -> str:
    """sha256 of every grid of a converted program, bit for bit, in the order of the ops that make and read them."""
    grids = [values[name].grid for name in inputs if values[name].grid is not None]
    for op in ops:
        grids += [values[name].grid for name in op.outputs]
        if op.weight is not None:
            grids.append(consts[op.weight].grid)
    digest = hashlib.sha256()
    for grid in grids:
        if grid is None:
            digest.update(b"float;")
            continue
        scale, zero_point = grid.filled()
        digest.update(f"{grid.qmin} {grid.qmax} {grid.axis};".encode())
        digest.update(scale.numpy().astype("<f4").tobytes() + zero_point.numpy().astype("<i4").tobytes())
    return digest.hexdigest()


def hash_plan(
    ops: Sequence[Op],
    values: Mapping[str, Value],
    consts: Mapping[str, Const],
    inputs: Sequence[str],
    outputs: Sequence[str],
) -> str:
    """sha256 of a plan's meaning: names are replaced by their order, origins and numbers are left out."""
    order: dict[str, int] = {}
    for name in [*inputs, *(name for op in ops for name in op.outputs)]:
        order.setdefault(name, len(order))
    grids: dict[int, int] = {}

    def grid(item: Grid | None) -> list[int | None] | None:
        if item is None:
            return None
        return [grids.setdefault(id(item), len(grids)), item.qmin, item.qmax, item.axis]

    text = json.dumps(
        {
            "inputs": [order[name] for name in inputs],
            "outputs": [order[name] for name in outputs],
            "values": [[list(values[n].shape), grid(values[n].grid)] for n in order],
            "ops": [
                [
                    op.kind.value,
                    [order[n] for n in op.inputs],
                    [order[n] for n in op.outputs],
                    [type(op.attrs).__name__, asdict(op.attrs)],
                    None if op.weight is None else [op.weight, grid(consts[op.weight].grid)],
                    None if op.body is None else _canonical_code(op.body),
                ]
                for op in ops
            ],
        }
    )
    return hashlib.sha256(text.encode()).hexdigest()


def _canonical_code(body: GraphModule) -> list[Any]:
    """A float island as data: its nodes in order, numbered instead of named."""
    order = {node: i for i, node in enumerate(body.graph.nodes)}
    rows: list[Any] = []
    for node in body.graph.nodes:
        target = node.target if isinstance(node.target, str) else str(node.target)
        args = torch.fx.map_arg((node.args, node.kwargs), lambda n: f"%{order[n]}")
        rows.append([node.op, "" if node.op == "placeholder" else target, repr(args)])
    return rows
