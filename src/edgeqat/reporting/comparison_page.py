"""Finished runs side by side as one page that needs nothing else: `edgeqat compare --html`."""

from __future__ import annotations

from markupsafe import Markup

from edgeqat.reporting.comparison import Comparison, row_verdict
from edgeqat.reporting.figures.drawing import embedded
from edgeqat.reporting.figures.results import metric_svg, tradeoff_svg
from edgeqat.reporting.page import environment
from edgeqat.reporting.summary import COLUMNS, table_rows
from edgeqat.reporting.verdict import verdict

__all__ = ["render_comparison"]


def render_comparison(comparison: Comparison) -> str:
    """The page; everything that comes from the runs is escaped."""
    reports = comparison.reports
    names = {report.results[0].metric.name for report in reports.values()}
    rows = [
        (run, *cells, {True: "pass", False: "FAIL", None: ""}[row_verdict(report, row)])
        for run, report in reports.items()
        for row, cells in zip(report.results, table_rows(report), strict=True)
    ]
    return (
        environment()
        .get_template("comparison.html")
        .render(
            title=f"edgeqat: {len(reports)} runs",
            runs=list(reports),
            columns=(
                "run",
                *(names.copy().pop() if c == "metric" and len(names) == 1 else c for c in COLUMNS),
                "gate",
            ),
            rows=rows,
            reports=reports,
            verdicts={run: verdict(report) for run, report in reports.items()},
            recipe=[(found.key, found.describe(list(reports))) for found in comparison.recipe],
            warnings=comparison.warnings,
            # Figures of different metrics have no common axis.
            drawings=_drawings(comparison) if len(names) == 1 else {},
        )
    )


def _drawings(comparison: Comparison) -> dict[str, Markup]:
    groups = {run: [r for r in report.results if r.artifact] for run, report in comparison.reports.items()}
    named = [(f"{run}: {row.variant}, {row.runtime}", row) for run, rows in groups.items() for row in rows]
    found = {
        "metric": (metric_svg(named) if named else None, "the metric of each artifact of each run"),
        "tradeoff": (tradeoff_svg(groups), "accuracy against latency of each artifact of each run"),
    }
    return {name: Markup(embedded(svg, name, label)) for name, (svg, label) in found.items() if svg is not None}
