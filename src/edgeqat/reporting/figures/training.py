"""The figure of training: loss and validation metric, epoch by epoch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from edgeqat.reporting.figures.drawing import drawn, no_more_than_all
from edgeqat.reporting.network_schema import StageRow

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["training_svg"]


def training_svg(stages: Sequence[StageRow], metric: str, is_share: bool) -> str | None:
    """Curves of each stage; None where nothing was trained."""
    known = [stage for stage in stages if stage.epochs]
    if not known:
        return None
    validated = any(epoch.metric is not None for stage in known for epoch in stage.epochs)
    factor = 100 if is_share else 1

    def draw(figure: Figure) -> None:
        panels = figure.subplots(1, 1 + validated, squeeze=False)[0]
        for stage in known:
            epochs = [epoch.index for epoch in stage.epochs]
            (line,) = panels[0].plot(epochs, [epoch.loss for epoch in stage.epochs], marker=".", label=stage.stage)
            found = [(epoch.index, factor * epoch.metric) for epoch in stage.epochs if epoch.metric is not None]
            if found:
                panels[1].plot(*zip(*found, strict=True), marker=".", color=line.get_color())
        for axes in panels:
            axes.set_xlabel("epoch of the stage")
            axes.xaxis.get_major_locator().set_params(integer=True)
        panels[0].set_ylabel("training loss")
        if validated:
            no_more_than_all(panels[1], is_share)
            panels[1].set_ylabel(f"validation {metric}" + (", %" if is_share else ""))
        figure.legend(loc="outside right upper")

    return drawn(draw, 10 if validated else 6, 3, "training")
