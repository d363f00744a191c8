"""Figures of what was found: metrics with their intervals, and accuracy against latency and size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from edgeqat.reporting.figures.drawing import INK, VARIANT_COLOURS, drawn, milliseconds, no_more_than_all, shortened
from edgeqat.reporting.schema import LatencyRow, Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["by_runtime", "metric_svg", "tradeoff_svg"]

MARKERS = "osD^vP*X"


def by_runtime(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows in groups of one runtime."""
    return {runtime: [r for r in rows if r.runtime == runtime] for runtime in dict.fromkeys(r.runtime for r in rows)}


def metric_svg(named: Sequence[tuple[str, Row]]) -> str:
    """The metric of each row, with its 95% interval; all have the same metric.

    Args:
        named: (what is written beside it, row), one at least.
    """
    metric = named[0][1].metric
    factor, unit = (100, ", %") if metric.is_share else (1, "")

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for at, (_, row) in enumerate(named):
            value, (low, high) = row.metric.value, row.metric.ci95
            # An interval is that of its own method, and may end at the value.
            error = [[factor * max(0.0, value - low)], [factor * max(0.0, high - value)]]
            axes.errorbar(factor * value, at, xerr=error, fmt="o", capsize=3, color=VARIANT_COLOURS[row.variant])
        axes.set_yticks(range(len(named)), [shortened(name) for name, _ in named])
        axes.set_ylim(len(named) - 0.5, -0.5)
        better = "" if metric.higher_is_better else ", lower is better"
        axes.set_xlabel(f"{metric.name}{unit}{better}; {metric.n} test samples, 95% intervals")

    return drawn(draw, 8, 0.8 + 0.28 * len(named), "metric")


def tradeoff_svg(groups: Mapping[str, Sequence[Row]]) -> str | None:
    """Accuracy against latency; the area of a dot is the size of its file. None where nothing was timed.

    Args:
        groups: Rows of the same metric, by what their marker stands for.
    """
    timed = {
        group: [(row, row.latency_ms, row.file_bytes) for row in rows if row.latency_ms and row.file_bytes]
        for group, rows in groups.items()
    }
    every = [found for rows in timed.values() for found in rows]
    if not every:
        return None
    metric, largest = every[0][0].metric, max(size for _, _, size in every)
    factor, unit = (100, ", %") if metric.is_share else (1, "")

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for index, (group, rows) in enumerate(timed.items()):
            marker = MARKERS[index % len(MARKERS)]
            for row, latency, size in rows:
                axes.scatter(
                    latency.p50,
                    factor * row.metric.value,
                    s=30 + 300 * size / largest,
                    marker=marker,
                    color=VARIANT_COLOURS[row.variant],
                    edgecolors=INK,
                    linewidths=0.5,
                    alpha=0.85,
                )
            axes.scatter([], [], marker=marker, color="none", edgecolors=INK, label=shortened(group, 30))
        for variant in dict.fromkeys(row.variant for row, _, _ in every):
            axes.scatter([], [], marker="s", color=VARIANT_COLOURS[variant], label=variant)
        no_more_than_all(axes, metric.is_share)
        milliseconds(axes.xaxis, *_extremes([latency for _, latency, _ in every]))
        axes.set_xlabel("median latency of a call, ms")
        axes.set_ylabel(metric.name + unit)
        figure.legend(loc="outside right upper")

    return drawn(draw, 8, 3.6, "tradeoff")


def _extremes(found: Sequence[LatencyRow]) -> tuple[float, float]:
    medians = [latency.p50 for latency in found]
    return min(medians), max(medians)
