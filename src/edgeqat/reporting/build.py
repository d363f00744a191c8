"""Building the report: every row by the same code, whatever the variant and runtime."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from edgeqat.data.dataset import Dataset
from edgeqat.machine import describe_machine
from edgeqat.measuring.bench import latency_ratio
from edgeqat.measuring.measure import Measurement
from edgeqat.measuring.parity import Parity
from edgeqat.measuring.variant import Variant
from edgeqat.metrics import Metric, Scores, evaluate
from edgeqat.recipe import Recipe
from edgeqat.reporting.changes import find_changes
from edgeqat.reporting.network_schema import NetworkRows, StageRow
from edgeqat.reporting.schema import (
    FLOAT_TWIN,
    AidRow,
    HazardRow,
    LatencyRow,
    MetricRow,
    OpsRow,
    OpTimeRow,
    ParityRow,
    Report,
    Row,
    ValueRow,
    judge,
)
from edgeqat.signature import Batch, call
from edgeqat.version import __version__

__all__ = ["Insight", "build_report", "samples_path"]


@dataclass(frozen=True)
class Insight:
    """What a run has seen beside its results: the plan as text, the network that ships, training, aids of ptq."""

    plan: str
    network: NetworkRows | None
    training: Sequence[StageRow]
    aids: Sequence[AidRow]


def samples_path(variant: Variant, runtime: str) -> str:
    return f"latency/{variant.name}-{runtime}.csv"


def build_report(
    recipe: Recipe,
    data: Dataset,
    test: Iterable[tuple[Batch, Any]],
    variants: list[Variant],
    metric: Metric,
    seen: Insight,
) -> Report:
    """Everything that was found, as report.json holds it.

    Args:
        recipe: What was run.
        data: What it was run on.
        test: The test split in batches.
        variants: Lowered, verified and measured.
        metric: The recipe's.
        seen: What else was seen on the way.
    """
    rows: list[Row] = []
    scores: dict[tuple[str, str], Scores] = {}
    for variant in variants:
        scores[variant.name, "simulation"] = evaluate(lambda x, m=variant.model: call(m, x), test, metric)  # type: ignore[misc]
        for runtime, measurement in variant.measured.items():
            scores[variant.name, runtime] = measurement.scores
    for variant in variants:
        for runtime in ("simulation", *variant.artifacts):
            timed_twin = next(
                (v.measured.get(runtime) for v in variants if v.name == FLOAT_TWIN.get(variant.name)), None
            )
            rows.append(_row(metric, variant, runtime, scores, data.labels, timed_twin))
    gated = "ptq" if recipe.train is None else "qat"
    return Report(
        edgeqat=__version__,
        recipe=recipe.model_dump(),
        recipe_sha256=recipe.sha256(),
        machine=describe_machine(recipe.measure.threads).to_dict(),
        data={
            "source": data.source,
            "train_n": len(data.train),
            "calibration_n": len(data.calibration),
            "eval_n": len(data.test),
        },
        results=rows,
        gate=judge(rows, recipe.gate, list(variants[0].artifacts), gated),
        ptq_aids=list(seen.aids),
        plan=seen.plan,
        network=seen.network,
        training=list(seen.training),
    )


def _row(
    metric: Metric,
    variant: Variant,
    runtime: str,
    scores: dict[tuple[str, str], Scores],
    labels: Sequence[str] | None,
    timed_twin: Measurement | None,
) -> Row:
    own = scores[variant.name, runtime]
    twin = scores[FLOAT_TWIN[variant.name], runtime] if variant.name in FLOAT_TWIN else None
    drop = None if twin is None else metric.drop(twin.statistics, own.statistics)
    artifact, measured = variant.artifacts.get(runtime), variant.measured.get(runtime)
    parity = variant.parity.get(runtime)
    program = variant.program
    return Row(
        variant=variant.name,  # type: ignore[arg-type]
        runtime=runtime,
        engine=None if artifact is None else artifact.engine,
        arithmetic=None if artifact is None else artifact.arithmetic(),
        metric=_metric_row(metric, own),
        drop=None if drop is None else drop.value,
        drop_ci95=None if drop is None else (drop.low, drop.high),
        file_bytes=None if measured is None else measured.file_bytes,
        payload_bytes=None if measured is None else measured.payload_bytes,
        latency_ms=None if measured is None else _latency_row(variant, runtime, measured),
        speedup_ci95=None if measured is None or timed_twin is None else _speedup_interval(measured, timed_twin),
        peak_memory_bytes=variant.memory.get(runtime),
        parity=None if parity is None else _parity_row(parity),
        ops=OpsRow(integer=len(program.integer_ops()), float=len(program.float_origins())),
        profile=[OpTimeRow(op=t.op, count=t.count, ms=t.ms) for t in variant.profile.get(runtime, ())],
        artifact=None if artifact is None else f"artifacts/{variant.name}/{runtime}/{artifact.path.name}",
        sha256=None if artifact is None else str(artifact.manifest["files"][artifact.path.name]["sha256"]),
        changes=None if twin is None or artifact is None else find_changes(metric, twin, own, labels),
        hazards=[] if artifact is None else [HazardRow(**found) for found in artifact.manifest["hazards"]],
    )


def _metric_row(metric: Metric, scores: Scores) -> MetricRow:
    found = metric.estimate(scores.statistics)
    return MetricRow(
        name=metric.name,
        value=found.value,
        ci95=(found.low, found.high),
        n=found.n,
        higher_is_better=metric.higher_is_better,
        is_share=metric.is_share,
    )


def _speedup_interval(measured: Measurement, twin: Measurement) -> tuple[float, float]:
    """Both were called in the same rounds."""
    found = latency_ratio(twin.latency.samples_ms, measured.latency.samples_ms)
    return found.low, found.high


def _latency_row(variant: Variant, runtime: str, measured: Measurement) -> LatencyRow:
    latency = measured.latency
    return LatencyRow(
        batch=latency.batch,
        threads=latency.threads,
        n=len(latency.samples_ms),
        p50=latency.percentile(50),
        p90=latency.percentile(90),
        p99=latency.percentile(99),
        samples=samples_path(variant, runtime),
    )


def _parity_row(parity: Parity) -> ParityRow:
    fields: dict[str, Any] = {name: getattr(parity, name) for name in ParityRow.model_fields}
    values = [ValueRow(name=v.name, op=v.op, histogram=dict(v.histogram)) for v in parity.values]
    return ParityRow(**fields | {"values": values, "unseen": list(parity.unseen)})
