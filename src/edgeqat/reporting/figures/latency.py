"""The figure of latencies: every timed call, as the share of calls that took no longer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from edgeqat.reporting.figures.drawing import VARIANT_COLOURS, drawn, milliseconds

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["latency_svg"]


def latency_svg(samples: Mapping[tuple[str, str], Sequence[float]]) -> str | None:
    """A panel a runtime; None where nothing was timed.

    Args:
        samples: Milliseconds of each call, by (variant, runtime).
    """
    runtimes = list(dict.fromkeys(runtime for _, runtime in samples))
    if not runtimes:
        return None

    def draw(figure: Figure) -> None:
        panels = figure.subplots(1, len(runtimes), squeeze=False, sharey=True)[0]
        for axes, runtime in zip(panels, runtimes, strict=True):
            for (variant, own), found in samples.items():
                if own == runtime:
                    axes.ecdf(found, label=variant, color=VARIANT_COLOURS[variant])
            timed = [ms for (_, own), found in samples.items() if own == runtime for ms in found]
            milliseconds(axes.xaxis, min(timed), max(timed))
            axes.set_title(runtime)
            axes.set_xlabel("ms a call")
            axes.tick_params(axis="x", labelrotation=45)
        panels[0].set_ylabel("share of calls")
        panels[0].legend(loc="lower right")

    return drawn(draw, min(12.0, 1.0 + 3.2 * len(runtimes)), 3.2, "latency")
