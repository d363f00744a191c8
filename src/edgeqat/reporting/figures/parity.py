"""The figure of parity: by how many steps the integers inside each file differ from what they should be."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgeqat.reporting.figures.drawing import drawn
from edgeqat.reporting.schema import FLOAT_TWIN, Report

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["parity_svg"]


def parity_svg(report: Report) -> str | None:
    """The integers of each quantized file by their error in steps; None where none could be looked at."""
    rows = [r for r in report.results if r.variant in FLOAT_TWIN and r.parity is not None and r.parity.histogram]
    if not rows:
        return None
    steps = sorted({step for row in rows if row.parity is not None for step in row.parity.histogram})
    width = 0.8 / len(rows)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for index, row in enumerate(rows):
            assert row.parity is not None
            counts = [row.parity.histogram.get(step, 0) for step in steps]
            places = [at + (index - (len(rows) - 1) / 2) * width for at in range(len(steps))]
            bars = axes.bar(places, counts, width=0.9 * width, label=f"{row.variant}, {row.runtime}")
            axes.bar_label(bars, [f"{count:,}" if count else "" for count in counts], fontsize=7)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:,.0f}")  # that of powers writes mathematics, which is not parsed here
        axes.set_ylim(bottom=0.5)
        axes.set_xticks(range(len(steps)), [str(step) for step in steps])
        axes.set_xlabel("error in quantization steps")
        axes.set_ylabel("integers")
        figure.legend(loc="outside right upper")

    return drawn(draw, 8, 3, "parity")
