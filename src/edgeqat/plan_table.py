"""A plan as a table: one row an op, each op of a float island its own."""

from __future__ import annotations

from dataclasses import dataclass

from edgeqat.program import Kind, Op, QuantizedProgram

__all__ = ["PlanRow", "rows_of"]


@dataclass(frozen=True)
class PlanRow:
    """One line of a plan: an op, and how or why not it runs in integers."""

    op: str
    kind: str
    runs: str
    module: str
    grid_in: str
    grid_weight: str
    grid_out: str
    fused: str
    reason: str
    group: str


def rows_of(program: QuantizedProgram, op: Op) -> list[PlanRow]:
    """The rows of one op of a plan."""
    if op.kind is Kind.FLOAT:
        return [
            PlanRow(
                o.module or "<model>",
                o.aten.removeprefix("aten."),
                "float",
                o.describe(),
                "float",
                "",
                "float",
                "",
                o.reason,
                o.group,
            )
            for o in op.origins
        ]

    def grid(name: str) -> str:
        found = program.values[name].grid
        return "float" if found is None else found.describe()

    weight = "" if op.weight is None else program.consts[op.weight].grid.describe()
    activation = getattr(op.attrs, "activation", None)
    norms = [o.module for o in op.origins[1:] if o.aten == "aten.batch_norm"]
    fused = " + ".join([*norms, *([activation] if activation else [])])
    module = op.origins[0].describe() if op.origins else ""
    inputs = ", ".join(grid(name) for name in op.inputs)
    why, group = program.values[op.name].why, op.origins[0].group if op.origins else ""
    return [PlanRow(op.name, op.kind.value, "INT8", module, inputs, weight, grid(op.name), fused, why, group)]
