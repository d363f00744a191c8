"""Measure: metric, latency and size of artifacts, all of them by one code path."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgeqat.arguments import PAIRS, check_batches, check_made
from edgeqat.errors import DataError, InputError
from edgeqat.intervals import Estimate
from edgeqat.lowering.artifact import Artifact
from edgeqat.measuring.latency import Latency, measure_latency
from edgeqat.metrics import MetricLike, Scores, evaluate, resolve_metric
from edgeqat.signature import Batch

__all__ = ["Measurement", "measure"]


@dataclass(frozen=True, eq=False)
class Measurement:
    """What one artifact did.

    Attributes:
        artifact: The artifact.
        metric: The metric with its 95% interval.
        scores: What the metric tells of each sample, for paired comparisons.
        file_bytes: Size of the model file.
        payload_bytes: Weights and biases alone.
        latency: Its calls.
    """

    artifact: Artifact
    metric: Estimate
    scores: Scores
    file_bytes: int
    payload_bytes: int
    latency: Latency


def measure(
    artifacts: Sequence[Artifact],
    eval_batches: Iterable[tuple[Batch, Any]],
    metric: MetricLike = "top1",
    threads: int = 1,
    batch: int = 1,
    on_step: Callable[[], None] | None = None,
) -> list[Measurement]:
    """Measures each artifact on its real runtime; latencies are interleaved over all of them.

    Args:
        artifacts: At least one.
        eval_batches: (inputs, targets); iterated once per artifact.
        metric: A name, or a callable as `edgeqat.metrics.resolve_metric` takes it; it gets the model's own output
            structure.
        threads: Threads within an op, for metric and latency.
        batch: Samples a call, for the latency.
        on_step: Called after each artifact's metric, and after the latency of all.

    Raises:
        InputError: Unknown metric, no artifacts, no (inputs, targets), or no batch of the wanted size.
        DataError: No batches, or outputs or targets that the metric does not take.
    """
    chosen = resolve_metric(metric)
    if isinstance(artifacts, Artifact):
        raise InputError("found an Artifact, wanted a list of them; pass [artifact]")
    if isinstance(artifacts, (str, Path)):
        check_made(artifacts, Artifact)
    if not artifacts:
        raise InputError("found no artifacts, wanted at least one")
    for artifact in artifacts:
        check_made(artifact, Artifact)
    check_batches(eval_batches, PAIRS)
    found = []
    for artifact in artifacts:
        found.append(evaluate(lambda x, a=artifact: _outputs(a, x, threads), eval_batches, chosen))  # type: ignore[misc]
        if on_step is not None:
            on_step()
    inputs = _first_samples(artifacts[0], eval_batches, batch)
    named = {str(i): artifact for i, artifact in enumerate(artifacts)}
    latencies = measure_latency(named, dict.fromkeys(named, inputs), threads)
    if on_step is not None:
        on_step()
    return [
        Measurement(
            artifact,
            chosen.estimate(scores.statistics),
            scores,
            artifact.file_bytes,
            int(artifact.manifest["payload_bytes"]),
            latencies[str(i)],
        )
        for i, (artifact, scores) in enumerate(zip(artifacts, found, strict=True))
    ]


def _outputs(artifact: Artifact, inputs: Batch, threads: int) -> Any:
    found = artifact.run(inputs, threads)
    # A folder loaded from disk has forgotten whether its only output stood alone.
    return found[0] if artifact.signature is None and len(found) == 1 else found


def _first_samples(artifact: Artifact, batches: Iterable[tuple[Batch, Any]], n: int) -> list[Tensor]:
    """The first n samples, as flat inputs."""
    parts: list[list[Tensor]] = []
    for inputs, _ in batches:
        parts.append(artifact.flat_inputs(inputs))
        if sum(len(part[0]) for part in parts) >= n:
            return [torch.cat(tensors)[:n] for tensors in zip(*parts, strict=True)]
    raise DataError(f"found fewer than {n} samples to time a call of {n}; lower measure.batch")
