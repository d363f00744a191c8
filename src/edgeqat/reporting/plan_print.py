"""What `edgeqat inspect` prints: the plan as a table, with the columns that there is room for."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from edgeqat.planning import Plan
from edgeqat.reporting.terminal import fits

__all__ = ["print_plan"]

COLUMNS = {
    "op": "op",
    "kind": "kind",
    "runs": "runs",
    "in": "grid_in",
    "weight": "grid_weight",
    "out": "grid_out",
    "fused with": "fused",
    "block": "group",
    "why": "reason",
}
"""Heads, and where the cells come from."""

LEFT_OUT = (
    (),
    ("weight",),
    ("weight", "in", "out"),
    ("weight", "in", "out", "fused with"),
    ("weight", "in", "out", "fused with", "block"),
)
"""What a narrow terminal does without: first what is the same for all ops, last what a line below can say."""

WHY_COLUMNS = 32
"""Reasons are sentences: they wrap between words, and are readable from this width on."""


def print_plan(planned: Plan, console: Console) -> None:
    """Prints each op and why it runs as it does, the blocks, what was not fused, and the totals."""
    rows = [[str(getattr(row, field)) for field in COLUMNS.values()] for row in planned.rows()]
    blocks: dict[str, list[str]] = {}
    for row in planned.rows():
        if row.group:
            blocks.setdefault(row.group, []).append(row.op)
    choices = LEFT_OUT if blocks else [(*names, "block") for names in LEFT_OUT[:-1]]
    left_out = next((names for names in choices if fits(_table(rows, names, WHY_COLUMNS), console)), choices[-1])
    console.print(_table(rows, left_out))
    for name, ops in blocks.items() if "block" in left_out else ():
        console.print(f"block  {name}: {', '.join(dict.fromkeys(ops))}", markup=False)
    left_out = tuple(name for name in left_out if name != "block")
    for refusal in planned.refusals:
        console.print(f"not fused  {refusal.name}: {refusal.reason}", markup=False)
    console.print(f"{planned.totals()}; plan {planned.program.plan_hash[:12]}")
    if left_out:
        console.print(f"left out for want of room: {', '.join(left_out)}; --json shows them", soft_wrap=True)


def _table(rows: Sequence[Sequence[str]], left_out: Sequence[str], why_columns: int | None = None) -> Table:
    table = Table(header_style="bold", box=box.SIMPLE, padding=(0, 1), pad_edge=False)
    shown = [name for name in COLUMNS if name not in left_out]
    for name in shown:
        table.add_column(name, overflow="fold", max_width=why_columns if name == "why" else None)
    for cells in rows:
        by_name = dict(zip(COLUMNS, cells, strict=True))
        table.add_row(*(Text(by_name[name]) for name in shown))
    return table
