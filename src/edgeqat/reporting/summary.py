"""The final table: what a person reads at a glance before deciding to ship."""

from __future__ import annotations

from collections import Counter

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from edgeqat.reporting.schema import FLOAT_TWIN, MetricRow, Report, Row, size_ratio, speedup
from edgeqat.reporting.verdict import DO_NOT_SHIP, SHIP, passing_artifacts, slower_than_float, verdict

__all__ = [
    "figure",
    "hazard_lines",
    "header",
    "memory_rows",
    "not_measured",
    "print_summary",
    "table_rows",
]

COLUMNS = ("variant", "metric", "drop", "size", "latency", "parity")
"""Every cell has two lines, the figure and what qualifies it, so that the table fits 80 columns."""

NOT_MEASURED = (
    "power and energy",
    "thermal throttling",
    "cold start and load time",
    "devices other than this machine",
    "GPUs, NPUs and other accelerators",
    "pre- and post-processing",
    "data unlike the test split",
)
"""What no report says anything about, in plain words."""


def figure(value: float, is_share: bool) -> str:
    """A metric as people read it: a share in percent, anything else in its own unit."""
    return f"{100 * value:.2f}%" if is_share else f"{value:.4g}"


def change(value: float, is_share: bool) -> str:
    """A drop, with its sign: in points of a share, else in the metric's unit."""
    return f"{100 * value:+.2f}" if is_share else f"{value:+.3g}"


def header(report: Report) -> tuple[str, ...]:
    """The column heads; that of the metric says where lower is better."""
    metric = report.results[0].metric
    return tuple(_metric_head(metric) if column == "metric" else column for column in COLUMNS)


def _metric_head(metric: MetricRow) -> str:
    return metric.name if metric.higher_is_better else f"{metric.name}\n(lower is better)"


def table_rows(report: Report) -> list[tuple[str, ...]]:
    """The table's cells, a row a result; plain text, for the terminal and for the page."""
    return [_cells(report, row) for row in report.results]


def _cells(report: Report, row: Row) -> tuple[str, ...]:
    twin = report.row(FLOAT_TWIN.get(row.variant, ""), row.runtime)
    (low, high), is_share = row.metric.ci95, row.metric.is_share
    interval = f"{100 * low:.1f}-{100 * high:.1f}" if is_share else f"{low:.4g}..{high:.4g}"
    metric = f"{figure(row.metric.value, is_share)}\n{interval}"
    drop = size = latency = parity = ""
    if row.drop is not None and row.drop_ci95 is not None:
        drop = f"{change(row.drop, is_share)}\n{'..'.join(change(end, is_share) for end in row.drop_ci95)}"
    if row.file_bytes is not None:
        size = f"{row.file_bytes / 1000:.1f} kB" + _times(None if twin is None else size_ratio(row, twin))
    if row.latency_ms is not None:
        latency = f"{row.latency_ms.p50:.3f} ms" + _times(None if twin is None else speedup(row, twin))
    if row.parity is not None:
        exact = row.parity.against.startswith("reference")
        share = row.parity.bit_identical if exact else row.parity.agreement
        parity = f"{100 * share:.2f}%\n{'bits' if exact else 'agree'}"
    return (f"{row.variant}\n{row.runtime}", metric, drop, size, latency, parity)


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"\n{ratio:.2f}x"


def memory_rows(report: Report) -> list[str]:
    """The cells of a column for the peak memory of each row, in MB; no cells where none was measured."""
    found = [row.peak_memory_bytes for row in report.results]
    if all(peak is None for peak in found):
        return []
    return ["" if peak is None else f"{peak / 1e6:.1f} MB" for peak in found]


def hazard_lines(report: Report) -> list[str]:
    """A line a row that has hazards: how many ops of each kind, and where; report.json names them."""
    lines = []
    for row in report.results:
        counts = Counter((hazard.kind, hazard.where) for hazard in row.hazards)
        if counts:
            kinds = ", ".join(f"{kind} in {n} ops ({where})" for (kind, where), n in counts.items())
            lines.append(f"hazards: {kinds}  ({row.variant}, {row.runtime})")
    return lines


def not_measured(report: Report) -> str:
    """What this report says nothing about, in plain words."""
    return ", ".join((*NOT_MEASURED, *(() if memory_rows(report) else ("memory at run time",))))


def print_summary(report: Report, console: Console) -> None:
    """Prints the table, the gate check by check, and which artifact to ship."""
    table = Table(header_style="bold", box=box.SIMPLE, padding=(0, 1))
    for column in header(report):
        table.add_column(Text(column), no_wrap=True)
    for cells in table_rows(report):
        table.add_row(*(Text(cell) for cell in cells))
    console.print(table)
    for row, cell in zip(report.results, memory_rows(report), strict=False):
        if cell:
            console.print(f"peak memory {cell}  ({row.variant}, {row.runtime})", markup=False)
    for line in hazard_lines(report):
        console.print(line, markup=False, soft_wrap=True)
    for check in report.gate.checks:
        sign = "<=" if check.name.startswith("max") else ">="
        verdict = "[green]pass[/green]" if check.passed else "[red]FAIL[/red]"
        console.print(
            f"{verdict}  {check.name} {check.value:.4g} {sign} {check.limit:.4g}  ({check.variant}, {check.runtime})"
        )
    _print_verdict(report, console)
    console.print(f"not measured: {not_measured(report)}", soft_wrap=True)


def _print_verdict(report: Report, console: Console) -> None:
    """Whether to ship and which file, the others that passed, and what is slower than the float model."""
    passed, found = [str(row.artifact) for row in passing_artifacts(report)], verdict(report)
    if found == DO_NOT_SHIP:
        console.print("[bold red]do not ship[/bold red]  the gate failed")
    elif found == SHIP and passed:
        console.print(f"[bold green]ship[/bold green]  {passed[0]}", soft_wrap=True)
        if len(passed) > 1:
            console.print(f"      the fastest of {len(passed)} that passed; the others:")
        for name in passed[1:]:
            console.print(f"      {name}", markup=False, soft_wrap=True)
    else:
        console.print(f"[bold yellow]{found}[/bold yellow]")
        for name in passed[:1]:
            console.print(f"      the fastest of {len(passed)} files: {name}", markup=False, soft_wrap=True)
    slower = slower_than_float(report)
    if slower:
        console.print(f"[bold yellow]slower than FP32[/bold yellow]: {slower}", soft_wrap=True)
