"""The network as a graph, coloured by the grids of its values or by their error."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from edgeqat.reporting.figures.drawing import INK, QUIET, drawn, shortened
from edgeqat.reporting.network_schema import OpRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["error_graph_svg", "grid_graph_svg", "row_id"]

GRID_COLOURS = {
    "8 bits": "#3d85c6",
    "5 to 7 bits": "#8e7cc3",
    "2 to 4 bits": "#4c9f70",
    "float result of integers": "#f1c232",
    "float": "#d62728",
}


def row_id(index: int) -> str:
    """The id of an op's row in the table beside the graph."""
    return f"op-{index}"


def grid_graph_svg(ops: Sequence[OpRow]) -> str:
    """Coloured by the grid of each op's result."""

    def colour(axes: Axes, places: list[tuple[float, float]]) -> None:
        found = [_grid_class(op) for op in ops]
        for label, shade in GRID_COLOURS.items():
            chosen = [place for place, own in zip(places, found, strict=True) if own == label]
            if chosen:
                axes.scatter(*_columns(chosen), s=60, marker="s", color=shade, label=label, zorder=2)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=5)

    return _graph(ops, colour, "graph-grids")


def error_graph_svg(ops: Sequence[OpRow]) -> str | None:
    """Coloured by the SQNR of each op's result; None where it was not measured."""
    if all(op.sqnr_db is None for op in ops):
        return None

    def colour(axes: Axes, places: list[tuple[float, float]]) -> None:
        known = [(place, op.sqnr_db) for place, op in zip(places, ops, strict=True) if op.sqnr_db is not None]
        rest = [place for place, op in zip(places, ops, strict=True) if op.sqnr_db is None]
        if rest:
            axes.scatter(*_columns(rest), s=60, marker="s", color="none", edgecolors=QUIET, zorder=2)
        x, y = _columns([place for place, _ in known])
        # Red is little: fewer decibels are more error.
        dots = axes.scatter(x, y, s=60, marker="s", c=[value for _, value in known], cmap="RdYlBu", zorder=2)
        axes.figure.colorbar(dots, ax=axes, label="SQNR, dB", location="top", shrink=0.5, aspect=40)

    return _graph(ops, colour, "graph-error")


def _grid_class(op: OpRow) -> str:
    if op.runs == "float":
        return "float"
    found = re.match(r"[us](\d+)", op.grid_out)
    if found is None:
        return "float result of integers"
    bits = int(found[1])
    return "8 bits" if bits >= 8 else "5 to 7 bits" if bits > 4 else "2 to 4 bits"


def _columns(places: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in places], [y for _, y in places]


def _graph(ops: Sequence[OpRow], colour: Callable[[Axes, list[tuple[float, float]]], None], name: str) -> str:
    places, width = _places(ops)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        at = {op.name: place for op, place in zip(ops, places, strict=True)}
        for op, place in zip(ops, places, strict=True):
            for source in op.reads:
                _edge(axes, at[source], place)
        colour(axes, places)
        for index, (op, (x, y)) in enumerate(zip(ops, places, strict=True)):
            told = axes.annotate(
                f"{shortened(op.name)} · {op.kind}",
                (x, y),
                xytext=(8, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
            )
            told.set_url(f"#{row_id(index)}")
        axes.set_xlim(-0.35, width - 1 + 0.9)
        axes.set_ylim(max(y for _, y in places) + 0.7, -0.7)
        axes.axis("off")

    depth = max(y for _, y in places) + 1
    return drawn(draw, 3 + 3.2 * width, 1 + 0.24 * depth, name)


def _places(ops: Sequence[OpRow]) -> tuple[list[tuple[float, float]], int]:
    """(x, y) of each op, and how many stand side by side at most; y is the longest way there."""
    import networkx

    graph: Any = networkx.DiGraph()
    graph.add_nodes_from(op.name for op in ops)
    graph.add_edges_from((source, op.name) for op in ops for source in op.reads)
    places: dict[str, tuple[float, float]] = {}
    order = {op.name: index for index, op in enumerate(ops)}
    width = 1
    for depth, names in enumerate(networkx.topological_generations(graph)):
        for index, name in enumerate(sorted(names, key=order.__getitem__)):
            places[name] = (float(index), float(depth))
            width = max(width, index + 1)
    return [places[op.name] for op in ops], width


def _edge(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    # What skips a level bends around what stands between.
    bend = 0.0 if end[1] - start[1] <= 1 or start[0] != end[0] else 0.35
    arrow = {
        "arrowstyle": "-|>",
        "color": INK,
        "alpha": 0.6,
        "linewidth": 0.8,
        "shrinkA": 4,
        "shrinkB": 5,
        "connectionstyle": f"arc3,rad={bend}",
    }
    axes.annotate("", xy=end, xytext=start, arrowprops=arrow, zorder=1)
