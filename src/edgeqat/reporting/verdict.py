"""What a report comes to: whether to ship, which files may, and what speaks against them all the same."""

from __future__ import annotations

from edgeqat.reporting.schema import FLOAT_TWIN, Report, Row, speedup

__all__ = ["DO_NOT_SHIP", "NO_GATE", "SHIP", "best_artifact", "passing_artifacts", "slower_than_float", "verdict"]

SHIP = "ship"
DO_NOT_SHIP = "do not ship"
NO_GATE = "no gate: nothing was checked"
"""The verdict where the gate has no limit: a gate of nothing is passed by anything."""


def verdict(report: Report) -> str:
    """One of the three."""
    if not report.gate.passed:
        return DO_NOT_SHIP
    return SHIP if report.gate.checks else NO_GATE


def passing_artifacts(report: Report) -> list[Row]:
    """The quantized artifacts that pass every check made on them, the fastest first; without a gate, all of them."""
    failed = {(c.variant, c.runtime) for c in report.gate.checks if not c.passed}
    gated = {(c.variant, c.runtime) for c in report.gate.checks}
    timed = [(r.latency_ms.p50, r) for r in report.results if r.latency_ms is not None and r.variant in FLOAT_TWIN]
    # With limits, only those may ship that they were checked on.
    passing = [(ms, r) for ms, r in timed if not gated or (r.variant, r.runtime) in gated - failed]
    return [row for _, row in sorted(passing, key=lambda found: found[0])]


def best_artifact(report: Report) -> Row | None:
    """The fastest quantized artifact that passes every check of the gate; None if none does."""
    return next(iter(passing_artifacts(report)), None)


def slower_than_float(report: Report) -> str:
    """`litert 0.19x, onnxruntime 0.62x`: where what would ship is slower than FP32 on its runtime, beyond chance."""
    told = []
    for row in report.results:
        twin = report.row(FLOAT_TWIN.get(row.variant, ""), row.runtime)
        ratio = None if twin is None else speedup(row, twin)
        sure = row.speedup_ci95 is not None and row.speedup_ci95[1] < 1
        if row.variant == report.results[-1].variant and ratio is not None and ratio < 1 and sure:
            told.append((ratio, f"{row.runtime} {ratio:.2f}x"))
    return ", ".join(text for _, text in sorted(told))
