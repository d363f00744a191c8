"""Latency: every artifact's calls interleaved in one run, so that what disturbs one disturbs all.

The threads of the runtime are pinned to what is asked for. Raw samples are kept. Before each timed call the same
artifact is called untimed: else whoever comes after a large model in turn pays for the caches that it filled, which
made the same file 1.2 times slower or faster by its place in the row.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from edgeqat.lowering.artifact import Artifact
from edgeqat.lowering.session import Session

__all__ = ["Latency", "measure_latency"]

WARM_UP_CALLS, WARM_UP_S = (3, 30), 1.0
"""Fewest and most calls of an artifact before the first round; between them this many seconds decide."""

MIN_ROUNDS, MAX_ROUNDS = 10, 2000
BUDGET_S = 3.0
"""Seconds of rounds per artifact; a round calls each artifact once. Calls of a second get the fewest rounds."""


@dataclass(frozen=True)
class Latency:
    """Wall time of one call.

    Attributes:
        batch: Samples a call.
        threads: Threads within an op.
        samples_ms: Every measured call, in milliseconds, in order.
    """

    batch: int
    threads: int
    samples_ms: tuple[float, ...]

    def percentile(self, q: float) -> float:
        """The q-th percentile in milliseconds."""
        return float(np.percentile(self.samples_ms, q))


def measure_latency(
    artifacts: Mapping[str, Artifact], inputs: Mapping[str, Sequence[Tensor]], threads: int
) -> dict[str, Latency]:
    """Times artifacts call by call in turn, in an order drawn anew each round.

    Args:
        artifacts: By any name.
        inputs: Flat input tensors of one call of each.
        threads: Threads within an op.
    """
    sessions = {name: artifact.session(threads) for name, artifact in artifacts.items()}
    feeds = {name: session.feed(inputs[name]) for name, session in sessions.items()}
    samples: dict[str, list[float]] = {name: [] for name in sessions}
    for name, session in sessions.items():
        _warm_up(session, feeds[name])
    rounds, deadline = 0, time.perf_counter() + BUDGET_S * len(sessions)
    order, drawn = list(sessions), random.Random(0)
    while rounds < MIN_ROUNDS or (rounds < MAX_ROUNDS and time.perf_counter() < deadline):
        drawn.shuffle(order)
        for name in order:
            session = sessions[name]
            with session.active():
                session.run_raw(feeds[name])
                started = time.perf_counter_ns()
                session.run_raw(feeds[name])
                samples[name].append((time.perf_counter_ns() - started) / 1e6)
        rounds += 1
    return {name: Latency(inputs[name][0].shape[0], threads, tuple(found)) for name, found in samples.items()}


def _warm_up(session: Session, feed: Any) -> None:
    fewest, most = WARM_UP_CALLS
    deadline = time.perf_counter() + WARM_UP_S
    with session.active():
        for call in range(most):
            session.run_raw(feed)
            if call + 1 >= fewest and time.perf_counter() > deadline:
                return
