"""The table of a sensitivity analysis: its rows, their ranking, and how it is printed and written down."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass
from typing import Any

from edgeqat.diagnose.effects import Effect, Measured
from edgeqat.diagnose.ranges import Ranges
from edgeqat.diagnose.units import WHOLE, Unit
from edgeqat.errors import InputError

__all__ = ["SCHEMA", "Row", "Sensitivity"]

SCHEMA = 1

COLUMNS = 80
"""What the printed table is made for."""


@dataclass(frozen=True)
class Row:
    """A layer, a part of one, or a value that no layer makes.

    Attributes:
        unit: What it is, and what its quantizers are called.
        only: The outputs when only it is quantized.
        without: The outputs when all but it is quantized.
        gain: By how much the metric is better when only it is left in float than when all is quantized, on pairs;
            None without a metric.
        ranges: The weight or value on its grid; None for a layer, whose parts have theirs, and where there are
            several.
    """

    unit: Unit
    only: Effect
    without: Effect
    gain: Measured | None
    ranges: Ranges | None


@dataclass(frozen=True)
class Sensitivity:
    """What each layer and each value costs; `print` shows it as a table.

    Attributes:
        n: Samples.
        metric: The metric's name; None without one.
        is_share: Whether its figures are in 0..1.
        float_metric: The float model's; None without a metric.
        quantized: The outputs when everything is quantized.
        rows: In the order of the network; each layer is followed by its parts.
    """

    n: int
    metric: str | None
    is_share: bool
    float_metric: float | None
    quantized: Effect
    rows: tuple[Row, ...]

    def ranked(self, by: str = "sqnr", when: str = "only", parts: Collection[str] = WHOLE) -> list[Row]:
        """The rows that cost most first.

        Args:
            by: "sqnr", "kl" or "metric"; rows that are equal in it go by SQNR.
            when: "only": the more the outputs suffer when only it is quantized, the earlier. "without": the more
                they recover when only it is left in float, the earlier.
            parts: Which rows: any of "layer", "input", "weight", "output", "value".

        Raises:
            InputError: An argument is none of these, or there is no such figure: outputs that are not scores of
                classes have no KL, and without a metric there is none.
        """
        if by not in ("sqnr", "kl", "metric") or when not in ("only", "without"):
            raise InputError(f"found by={by!r}, when={when!r}, wanted sqnr, kl or metric, and only or without")
        worst_first = 1.0 if when == "only" else -1.0

        def cost(row: Row) -> tuple[float, float]:
            effect = row.only if when == "only" else row.without
            figure = {"sqnr": effect.sqnr, "kl": effect.kl, "metric": effect.drop}[by]
            if figure is None:
                missing = "outputs that are scores of classes" if by == "kl" else "a metric"
                raise InputError(f"the table has no figure for by={by!r}, which wants {missing}; rank by 'sqnr'")
            loss = -figure.value if by == "sqnr" else figure.value
            return worst_first * loss, worst_first * -effect.sqnr.value

        return sorted((row for row in self.rows if row.unit.part in parts), key=cost, reverse=True)

    def parts_of(self, row: Row) -> dict[str, Row]:
        """The parts of a layer that can be quantized, by "input", "weight", "output"; of another row, none."""
        if row.unit.part != "layer":
            return {}
        same = (r for r in self.rows if r.unit.name == row.unit.name and r.unit.part in ("input", "weight", "output"))
        return {part.unit.part: part for part in same}

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; null stands for figures that are not there, and for an SQNR that is infinite."""
        found: dict[str, Any] = _finite({"schema": SCHEMA, **asdict(self)})
        found["rows"] = [{**row.pop("unit"), **row} for row in found["rows"]]
        return found

    def __str__(self) -> str:
        ranked = self.ranked()
        return "\n".join([*self._head(), "", *self._costs(ranked), "", *self._ranges(ranked)])

    def _head(self) -> list[str]:
        every = self.quantized
        lines = [f"{self.n} samples; the simulation against the float model, worst first"]
        if self.metric is not None and self.float_metric is not None and every.metric is not None:
            figures = [f"{100 * f:.2f}%" if self.is_share else f"{f:.4g}" for f in (self.float_metric, every.metric)]
            drop = self._change(every.drop)
            lines.append(f"{self.metric}: float {figures[0]}, quantized {figures[1]}, drop {drop} (standard error)")
        kl = "" if every.kl is None else f", KL {every.kl.value:.2g} nats"
        lines.append(f"outputs, all quantized: SQNR {_decibels(every.sqnr.value)} dB{kl}")
        return lines

    def _costs(self, rows: Iterable[Row]) -> list[str]:
        """What each layer and value costs: a line each."""
        with_kl, with_metric = self.quantized.kl is not None, self.metric is not None
        heads = ["only", "input", "weight", "output", *["KL"] * with_kl]
        heads += ["drop", "gain"] if with_metric else ["without"]
        lines = []
        for row in rows:
            parts = self.parts_of(row)
            cells = [_decibels(row.only.sqnr.value)]
            cells += [_decibels(parts[p].only.sqnr.value) if p in parts else "" for p in ("input", "weight", "output")]
            cells += [f"{row.only.kl.value:.2g}"] if row.only.kl is not None else []
            ends = [self._change(row.only.drop), self._change(row.gain)]
            lines.append((row.unit.name, [*cells, *(ends if with_metric else [_decibels(row.without.sqnr.value)])]))
        figures = "SQNR in dB and KL" if with_kl else "SQNR in dB"
        meaning = f"{figures} of the outputs, only it or only a part of it quantized;"
        rest = "drop: only it quantized, gain: only it left in float" if with_metric else "without: SQNR of all but it"
        return [meaning, rest, *_aligned(heads, lines)]

    def _ranges(self, rows: Iterable[Row]) -> list[str]:
        """Each weight and value on its grid: a line each."""
        lines = []
        for row in rows:
            for part, own in (self.parts_of(row) or {"": row}).items():
                found = own.ranges
                if found is not None and part != "input":  # which is another row's output
                    ratios = ["" if r is None else f"{r:.3g}" for r in (found.outlier_ratio, found.channel_ratio)]
                    extremes = [f"{found.low:.3g}", f"{found.high:.3g}"]
                    cells = [part, *extremes, f"{100 * found.clipped:.2g}%", *ratios, _decibels(found.sqnr)]
                    lines.append((row.unit.name, cells))
        meaning = "ranges in float; clipped: beyond the grid; outlier: largest by 99.9 % quantile;"
        rest = "channel: largest by median of channels' largest; SQNR of the value itself in dB"
        return [meaning, rest, *_aligned(["", "low", "high", "clipped", "outlier", "channel", "SQNR"], lines)]

    def _change(self, change: Measured | None) -> str:
        if change is None:
            return ""
        if self.is_share:
            return f"{100 * change.value:+.2f}±{100 * change.standard_error:.2f}"
        return f"{change.value:+.2g}±{change.standard_error:.1g}"


def _decibels(value: float) -> str:
    return f"{value:.1f}"


def _aligned(heads: list[str], lines: list[tuple[str, list[str]]]) -> list[str]:
    """Columns aligned to the right behind a name, which stands on a line of its own where there is no room for it."""
    table = [("", heads), *lines]
    widths = [max(len(cells[i]) for _, cells in table) for i in range(len(heads))]
    room = COLUMNS - sum(width + 1 for width in widths)
    name_width = min(max(len(name) for name, _ in table), max(room, 0))
    printed = []
    for name, cells in table:
        row = "".join(f" {cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        if len(name) > name_width:
            printed.append(name)
            name = ""
        printed.append(f"{name:<{name_width}}{row}".rstrip())
    return printed


def _finite(found: Any) -> Any:
    if isinstance(found, dict):
        return {key: _finite(value) for key, value in found.items()}
    if isinstance(found, (list, tuple)):
        return [_finite(value) for value in found]
    return None if isinstance(found, float) and not math.isfinite(found) else found
