"""The figure of a sensitivity analysis: what each layer and value costs, in the order of the network."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from edgeqat.diagnose.sensitivity_table import Row, Sensitivity
from edgeqat.diagnose.units import WHOLE
from edgeqat.reporting.figures.drawing import INK, QUIET, drawn, shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["sensitivity_svg"]

MARKERS = {"input": ("<", "tab:green"), "weight": ("s", "tab:orange"), "output": (">", "tab:blue")}
WHOLE_MARKER = ("o", INK)


def sensitivity_svg(table: Sensitivity) -> str:
    """The figure as SVG: the same bytes for the same table.

    On the left the SQNR of the outputs when only a layer, a part of it or a value is quantized; on the right what
    that costs in the metric, with standard errors, and what leaving only it in float gains; without a metric the
    SQNR of all but it.
    """
    rows = [row for row in table.rows if row.unit.part in WHOLE]

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2, sharey=True)
        _parts(left, table, rows)
        if table.metric is None:
            _others(right, table, rows)
        else:
            _metric(right, table, rows)
        left.set_yticks(range(len(rows)), [shortened(row.unit.name) for row in rows], fontsize=8)
        left.set_ylim(len(rows) - 0.5, -0.5)  # the network reads from top to bottom
        for axes in (left, right):
            axes.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4)  # above, where no dot is

    return drawn(draw, 10, 1.6 + 0.22 * len(rows), "sensitivity")


def _parts(axes: Axes, table: Sensitivity, rows: list[Row]) -> None:
    marker, colour = WHOLE_MARKER
    _dots(axes, [row.only.sqnr.value for row in rows], marker, colour, "layer or value", 7)
    for part, (marker, colour) in MARKERS.items():
        found = [table.parts_of(row).get(part) for row in rows]
        _dots(axes, [math.inf if row is None else row.only.sqnr.value for row in found], marker, colour, part, 4)
    axes.set_xlabel("SQNR of the outputs, dB: only it is quantized")


def _others(axes: Axes, table: Sensitivity, rows: list[Row]) -> None:
    marker, colour = WHOLE_MARKER
    _dots(axes, [row.without.sqnr.value for row in rows], marker, colour, "all but it", 7)
    if math.isfinite(table.quantized.sqnr.value):
        axes.axvline(table.quantized.sqnr.value, linestyle="--", color=QUIET, label="all")
    axes.set_xlabel("SQNR of the outputs, dB: all but it is quantized")


def _metric(axes: Axes, table: Sensitivity, rows: list[Row]) -> None:
    factor, unit = (100, "points") if table.is_share else (1, "its own unit")
    changes = {
        "drop, only it quantized": ([row.only.drop for row in rows], INK, -0.15),
        "gain, only it left in float": ([row.gain for row in rows], "tab:red", 0.15),
    }
    for label, (found, colour, shift) in changes.items():
        known = [(at + shift, change) for at, change in enumerate(found) if change is not None]
        axes.errorbar(
            [factor * change.value for _, change in known],
            [at for at, _ in known],
            xerr=[factor * change.standard_error for _, change in known],
            fmt="o",
            markersize=4,
            color=colour,
            label=label,
        )
    axes.axvline(0, color=QUIET, linewidth=0.8)
    axes.set_xlabel(f"{table.metric}, {unit}, with standard errors; {table.n} samples")


def _dots(axes: Axes, figures: list[float], marker: str, colour: str, label: str, size: int) -> None:
    """A dot a row; none where nothing changes."""
    known = [(at, value) for at, value in enumerate(figures) if math.isfinite(value)]
    axes.plot(
        [value for _, value in known],
        [at for at, _ in known],
        linestyle="",
        marker=marker,
        markersize=size,
        color=colour,
        label=label,
    )
