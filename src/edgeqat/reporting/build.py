"""Building the report: every row by the same code, whatever the variant and runtime."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from edgeqat.data.dataset import Dataset
from edgeqat.machine import describe_machine
from edgeqat.measuring.measure import Measurement, estimate
from edgeqat.measuring.parity import Parity
from edgeqat.measuring.variant import Variant
from edgeqat.metrics import METRICS, paired_difference
from edgeqat.recipe import Recipe
from edgeqat.reporting.schema import (
    FLOAT_TWIN,
    LatencyRow,
    MetricRow,
    OpsRow,
    ParityRow,
    Report,
    Row,
    judge,
)
from edgeqat.signature import Batch, call
from edgeqat.train.loop import predict
from edgeqat.version import __version__

__all__ = ["build_report", "samples_path"]


def samples_path(variant: Variant, runtime: str) -> str:
    return f"latency/{variant.name}-{runtime}.csv"


def build_report(recipe: Recipe, data: Dataset, test: Iterable[tuple[Batch, Any]], variants: list[Variant]) -> Report:
    """Everything that was found, as report.json holds it; `test` is the test split in batches."""
    rows: list[Row] = []
    scores: dict[tuple[str, str], Tensor] = {}
    metric = METRICS[recipe.task.metric]
    for variant in variants:
        outputs, targets = predict(lambda x, m=variant.model: call(m, x), test)  # type: ignore[misc]
        scores[variant.name, "simulation"] = metric.per_sample(outputs, targets)
        for runtime, measurement in variant.measured.items():
            scores[variant.name, runtime] = measurement.per_sample
    for variant in variants:
        for runtime in ("simulation", *variant.artifacts):
            rows.append(_row(recipe, variant, runtime, scores))
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
    )


def _row(recipe: Recipe, variant: Variant, runtime: str, scores: dict[tuple[str, str], Tensor]) -> Row:
    own = scores[variant.name, runtime]
    metric = estimate(own)
    twin = FLOAT_TWIN.get(variant.name)
    drop = None if twin is None else paired_difference(scores[twin, runtime], own)
    artifact, measured = variant.artifacts.get(runtime), variant.measured.get(runtime)
    parity = variant.parity.get(runtime)
    program = variant.program
    return Row(
        variant=variant.name,  # type: ignore[arg-type]
        runtime=runtime,
        engine=None if artifact is None else artifact.engine,
        arithmetic=None if artifact is None else artifact.arithmetic(),
        metric=MetricRow(name=recipe.task.metric, value=metric.value, ci95=(metric.low, metric.high), n=metric.n),
        drop=None if drop is None else drop.value,
        drop_ci95=None if drop is None else (drop.low, drop.high),
        file_bytes=None if measured is None else measured.file_bytes,
        payload_bytes=None if measured is None else measured.payload_bytes,
        latency_ms=None if measured is None else _latency_row(variant, runtime, measured),
        parity=None if parity is None else _parity_row(parity),
        ops=OpsRow(integer=len(program.integer_ops()), float=len(program.float_origins())),
        artifact=None if artifact is None else f"artifacts/{variant.name}/{runtime}/{artifact.path.name}",
        sha256=None if artifact is None else str(artifact.manifest["files"][artifact.path.name]["sha256"]),
    )


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
    return ParityRow(**fields)
