"""A plan: what was decided, as data and as a table of one row an op, each op of a float island its own."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from edgeqat.graph.patterns import Refusal
from edgeqat.grid_rules import GridRules
from edgeqat.program import Kind, Op, QuantizedProgram
from edgeqat.qconfig import ActivationConfig, WeightConfig

__all__ = ["Plan", "PlanRow", "rows_of"]


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


@dataclass(frozen=True, eq=False)
class Plan:
    """Everything that was decided.

    Attributes:
        program: The op list, with empty grids.
        activations: Settings of each grid, by the name of the first value that has it.
        weights: Settings of each Const, by its name.
        targets: The runtimes it was made for.
        folded: Dotted names of the batch norms folded into weights: before training, or by convert if they are live.
        refusals: What was not fused, and why.
        batch_norm: "fold" or "live".
        grid_rules: What the targets want of its grids.
    """

    program: QuantizedProgram
    activations: Mapping[str, ActivationConfig]
    weights: Mapping[str, WeightConfig]
    targets: tuple[str, ...]
    folded: tuple[str, ...]
    refusals: tuple[Refusal, ...]
    batch_norm: str = "fold"
    grid_rules: GridRules = field(default_factory=GridRules)

    def __deepcopy__(self, memo: dict[int, Any]) -> Plan:
        return self  # nothing changes it

    def rows(self) -> list[PlanRow]:
        """The plan as a table, an op a row; each op of a float island has its own."""
        return [row for op in self.program.ops for row in rows_of(self.program, op)]

    def totals(self) -> str:
        """How many ops run in integers, and how many in float."""
        integer = sum(row.runs == "INT8" for row in self.rows())
        return f"{integer} ops in INT8, {len(self.rows()) - integer} in float"

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON-ready data."""
        return {
            "plan_hash": self.program.plan_hash,
            "targets": list(self.targets),
            "ops": [asdict(row) for row in self.rows()],
            "batch_norm": self.batch_norm,
            "folded": list(self.folded),
            "refusals": [asdict(refusal) for refusal in self.refusals],
        }

    def diff(self, other: Plan) -> str:
        """The lines that differ between the two printed plans, as a unified diff; empty if none does."""
        return "\n".join(
            difflib.unified_diff(str(self).splitlines(), str(other).splitlines(), "this", "other", lineterm="", n=0)
        )

    def __str__(self) -> str:
        lines = [f"plan for {', '.join(self.targets)}"]
        for row in self.rows():
            grids = " ".join(filter(None, [row.grid_in, f"[{row.grid_weight}]" * bool(row.grid_weight)]))
            text = f"  {row.op}: {row.kind} {row.runs} {grids} -> {row.grid_out}"
            lines.append(
                text
                + f" fused {row.fused}" * bool(row.fused)
                + f" in {row.group}" * bool(row.group)
                + f" ({row.reason})" * bool(row.reason)
            )
        when = "" if self.batch_norm == "fold" else ", by convert: it is live in training"
        lines += [f"  folded {name}{when}" for name in self.folded]
        lines += [f"  not fused {refusal.name}: {refusal.reason}" for refusal in self.refusals]
        return "\n".join([*lines, self.totals()])
