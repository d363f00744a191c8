"""Figures of what was found: metrics with their intervals, and accuracy against latency and size."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgeqat.reporting.figures.drawing import INK, VARIANT_COLOURS, drawn, milliseconds
from edgeqat.reporting.schema import Report, Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["metric_svg", "tradeoff_svg"]


def metric_svg(report: Report) -> str:
    """The metric of each variant on each runtime, with its 95% interval."""
    rows, metric = report.results, report.results[0].metric
    factor = 100 if metric.is_share else 1

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for at, row in enumerate(rows):
            value, (low, high) = row.metric.value, row.metric.ci95
            # An interval is that of its own method, and may end at the value.
            error = [[factor * max(0.0, value - low)], [factor * max(0.0, high - value)]]
            axes.errorbar(factor * value, at, xerr=error, fmt="o", capsize=3, color=VARIANT_COLOURS[row.variant])
        axes.set_yticks(range(len(rows)), [f"{row.variant}, {row.runtime}" for row in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        better = "" if metric.higher_is_better else ", lower is better"
        axes.set_xlabel(
            f"{metric.name}{', %' if metric.is_share else ''}{better}; {metric.n} test samples, 95% intervals"
        )

    return drawn(draw, 8, 0.8 + 0.28 * len(rows), "metric")


def tradeoff_svg(report: Report) -> str | None:
    """Accuracy against latency; the area of a dot is the size of its file. None where nothing was timed."""
    rows = [row for row in report.results if row.latency_ms is not None and row.file_bytes is not None]
    if not rows:
        return None
    metric = rows[0].metric
    factor, largest = 100 if metric.is_share else 1, max(row.file_bytes or 0 for row in rows)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for marker, runtime in zip("osD^vP*X" * 4, dict.fromkeys(row.runtime for row in rows), strict=False):
            for row in (r for r in rows if r.runtime == runtime):
                axes.scatter(
                    _median(row),
                    factor * row.metric.value,
                    s=30 + 300 * (row.file_bytes or 0) / largest,
                    marker=marker,
                    color=VARIANT_COLOURS[row.variant],
                    edgecolors=INK,
                    linewidths=0.5,
                    alpha=0.85,
                )
            axes.scatter([], [], marker=marker, color="none", edgecolors=INK, label=runtime)
        for variant in dict.fromkeys(row.variant for row in rows):
            axes.scatter([], [], marker="s", color=VARIANT_COLOURS[variant], label=variant)
        medians = [_median(row) for row in rows]
        milliseconds(axes.xaxis, min(medians), max(medians))
        axes.set_xlabel("median latency of a call, ms")
        axes.set_ylabel(metric.name + (", %" if metric.is_share else ""))
        figure.legend(loc="outside right upper")

    return drawn(draw, 8, 3.6, "tradeoff")


def _median(row: Row) -> float:
    assert row.latency_ms is not None
    return row.latency_ms.p50
