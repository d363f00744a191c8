"""The figure of distributions: each value or weight over its own grid, and what is clipped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from edgeqat.reporting.figures.drawing import INK, drawn, shortened
from edgeqat.reporting.network_schema import DistributionRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["MOST_SHOWN", "distributions_svg", "shown"]

MOST_SHOWN = 48
"""Rows of a figure: the worst ones by SQNR, in the order of the network."""

FURTHEST = 0.5
"""How much of a grid's width is shown beyond its ends; what lies further is drawn at the edge."""

INSIDE, CLIPPED = "#3d85c6", "#d62728"


def shown(rows: Sequence[DistributionRow]) -> list[DistributionRow]:
    """Those of a figure: all of them where they are few."""
    drawable = [row for row in rows if row.counts and row.grid_high > row.grid_low]
    worst = sorted(drawable, key=lambda row: float("inf") if row.sqnr_db is None else row.sqnr_db)[:MOST_SHOWN]
    kept = {id(row) for row in worst}
    return [row for row in drawable if id(row) in kept]


def distributions_svg(rows: Sequence[DistributionRow], name: str) -> str | None:
    """A histogram a row, over the width of its grid; None where there is none to draw."""
    chosen = shown(rows)
    if not chosen:
        return None

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for at, row in enumerate(chosen):
            _histogram(axes, row, at)
        for end in (0.0, 1.0):
            axes.axvline(end, color=INK, linewidth=0.8)
        axes.set_yticks(range(len(chosen)), [shortened(row.name) for row in chosen], fontsize=8)
        axes.set_ylim(len(chosen) - 0.5, -1)
        axes.set_xlim(-FURTHEST, 1 + FURTHEST)
        axes.set_xticks([0, 1], ["smallest integer", "largest integer"])
        axes.grid(axis="y", visible=False)

    return drawn(draw, 8, 1 + 0.3 * len(chosen), name)


def _histogram(axes: Axes, row: DistributionRow, at: int) -> None:
    """Counts on a logarithmic scale, or the tails, which are what is clipped, would not be seen."""
    width = row.grid_high - row.grid_low
    edges = (np.linspace(row.low, row.high, len(row.counts) + 1) - row.grid_low) / width
    heights = np.log1p(np.array(row.counts, dtype=float))
    heights = 0.85 * heights / heights.max()
    edges = np.clip(edges, -FURTHEST, 1 + FURTHEST)
    # A bin that straddles an end of the grid by less than the half step that rounding costs is inside.
    half = 0.5 * row.scale / width
    inside = (edges[:-1] >= -half - 1e-9) & (edges[1:] <= 1 + half + 1e-9) | (row.clipped == 0.0)
    for part, colour in ((inside, INSIDE), (~inside, CLIPPED)):
        if part.any():
            axes.stairs(np.where(part, at - heights, at), edges, baseline=at, fill=True, color=colour)
