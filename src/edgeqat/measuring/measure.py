"""Measure: metric, latency and size of artifacts, all of them by one code path."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from edgeqat.errors import DataError, InputError
from edgeqat.lowering.artifact import Artifact
from edgeqat.measuring.latency import Latency, measure_latency
from edgeqat.metrics import METRICS, Estimate, proportion_interval
from edgeqat.signature import Batch
from edgeqat.train.loop import predict

__all__ = ["Measurement", "estimate", "measure"]


@dataclass(frozen=True, eq=False)
class Measurement:
    """What one artifact did.

    Attributes:
        artifact: The artifact.
        metric: The metric with its 95% interval.
        per_sample: The metric of each sample, [N], for paired comparisons.
        file_bytes: Size of the model file.
        payload_bytes: Weights and biases alone.
        latency: Its calls.
    """

    artifact: Artifact
    metric: Estimate
    per_sample: Tensor
    file_bytes: int
    payload_bytes: int
    latency: Latency


def measure(
    artifacts: Sequence[Artifact],
    eval_batches: Iterable[tuple[Batch, Any]],
    metric: str = "top1",
    threads: int = 1,
    batch: int = 1,
) -> list[Measurement]:
    """Measures each artifact on its real runtime; latencies are interleaved over all of them.

    Args:
        artifacts: At least one.
        eval_batches: (inputs, targets); iterated once per artifact.
        metric: Name of the metric.
        threads: Threads within an op, for metric and latency.
        batch: Samples a call, for the latency.

    Raises:
        InputError: Unknown metric, no artifacts, or no batch of the wanted size.
        DataError: No batches.
    """
    if metric not in METRICS:
        raise InputError(f"found the metric {metric!r}, wanted one of {', '.join(METRICS)}")
    if not artifacts:
        raise InputError("found no artifacts, wanted at least one")
    found: list[Tensor] = []
    for artifact in artifacts:
        session = artifact.session(threads)
        outputs, targets = predict(lambda x, a=artifact, s=session: s.run(a.flat_inputs(x))[0], eval_batches)  # type: ignore[misc]
        found.append(METRICS[metric].per_sample(outputs, targets))
    inputs = _first_samples(artifacts[0], eval_batches, batch)
    named = {str(i): artifact for i, artifact in enumerate(artifacts)}
    latencies = measure_latency(named, dict.fromkeys(named, inputs), threads)
    return [
        Measurement(
            artifact,
            estimate(per_sample),
            per_sample,
            artifact.file_bytes,
            int(artifact.manifest["payload_bytes"]),
            latencies[str(i)],
        )
        for i, (artifact, per_sample) in enumerate(zip(artifacts, found, strict=True))
    ]


def estimate(per_sample: Tensor) -> Estimate:
    """The share of right samples with its Wilson 95% interval."""
    return proportion_interval(int(per_sample.sum()), len(per_sample))


def _first_samples(artifact: Artifact, batches: Iterable[tuple[Batch, Any]], n: int) -> list[Tensor]:
    """The first n samples, as flat inputs."""
    parts: list[list[Tensor]] = []
    for inputs, _ in batches:
        parts.append(artifact.flat_inputs(inputs))
        if sum(len(part[0]) for part in parts) >= n:
            return [torch.cat(tensors)[:n] for tensors in zip(*parts, strict=True)]
    raise DataError(f"found fewer than {n} samples to time a call of {n}; lower measure.batch")
