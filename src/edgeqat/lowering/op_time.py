"""What a runtime's own profiler says of a kind of op."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["OpTime", "totals"]


@dataclass(frozen=True)
class OpTime:
    """One kind of op in the graph that really runs.

    Attributes:
        op: The runtime's name for it.
        count: How many of them run in a call.
        ms: Milliseconds a call spends in them; the profiler itself costs time, so that shares tell more than sums.
    """

    op: str
    count: int
    ms: float


def totals(events: Iterable[tuple[str, float]], calls: int) -> tuple[OpTime, ...]:
    """What (op, milliseconds) of single runs over some calls add up to, the slowest kind first."""
    found: dict[str, list[float]] = {}
    for op, ms in events:
        found.setdefault(op, []).append(ms)
    times = [OpTime(op, round(len(times) / calls), sum(times) / calls) for op, times in found.items()]
    return tuple(sorted(times, key=lambda time: -time.ms))
