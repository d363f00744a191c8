"""The stages of a run after training: every variant's files are made, proved and measured."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Sequence
from typing import Any

from edgeqat.files import write_atomically
from edgeqat.lowering.golden import GOLDEN_N
from edgeqat.lowering.lower import lower
from edgeqat.lowering.preprocessing import classes_of
from edgeqat.measuring.measure import measure
from edgeqat.measuring.memory import peak_memory
from edgeqat.measuring.parity import compare_float, verify
from edgeqat.measuring.profile import profile_ops
from edgeqat.measuring.variant import Variant
from edgeqat.program import QuantizedProgram
from edgeqat.reporting.build import samples_path
from edgeqat.reporting.monitor import Followed
from edgeqat.reporting.schema import FLOAT_TWIN
from edgeqat.run_context import Run
from edgeqat.signature import call
from edgeqat.target_rules import resolve_targets
from edgeqat.target_table import runtime_of

__all__ = ["lower_all", "measure_all", "verify_all"]


def lower_all(work: Run, variants: Sequence[Variant]) -> None:
    """Writes the artifact of each variant for each runtime."""
    work.monitor.stage("lower")
    preprocessing, golden = work.data.preprocessing(work.pixels is not None), work.example(GOLDEN_N)
    rules = resolve_targets(work.recipe.export)
    with work.monitor.steps("files", len(variants) * len(rules)) as advance:
        for variant in variants:
            for rule in rules:
                runtime, started = runtime_of(rule.name), time.perf_counter()
                place = work.folder / "artifacts" / variant.name / runtime
                steps = _fitting(preprocessing, variant.program)
                artifact = lower(variant.program, rule.spelled, place, golden, steps)
                variant.artifacts[runtime] = artifact
                seconds = time.perf_counter() - started
                work.monitor.detail(f"{artifact.path}: {artifact.file_bytes / 1000:.1f} kB ({seconds:.1f} s)")
                advance()


def _fitting(preprocessing: dict[str, Any], program: QuantizedProgram) -> dict[str, Any]:
    """With a label for every output, where a model has more of them than the data has classes; else with none."""
    labels, classes = preprocessing["labels"], classes_of(program)
    if labels is None or classes is None or len(labels) == classes:
        return preprocessing
    numbers = [str(number) for number in range(len(labels), classes)]
    return {**preprocessing, "labels": [*labels, *numbers] if numbers else None}


def verify_all(work: Run, variants: Iterable[Variant]) -> None:
    """Compares each artifact, on its runtime and over the test split, with what it should compute."""
    work.monitor.stage("verify every value on the runtime")
    classes = work.metric.classes or work.data.labels is not None
    for variant in variants:
        for runtime, artifact in variant.artifacts.items():
            started = time.perf_counter()
            inputs = Followed(work.monitor, f"{variant.name}, {runtime}", work.batches(work.data.test).inputs())
            # Bits are owed by quantized artifacts alone; of a float one the predictions are compared.
            exact = variant.name in FLOAT_TWIN
            if exact:
                parity = verify(artifact, variant.program, inputs, classes=classes)
            else:
                parity = compare_float(artifact, lambda batch, m=variant.model: call(m, batch), inputs, classes)  # type: ignore[misc]
            variant.parity[runtime] = parity
            share, what = (parity.bit_identical, "outputs") if exact else (parity.agreement, "predictions")
            name = variant.name if len(variant.artifacts) == 1 else f"{variant.name}, {runtime}"
            work.monitor.line(f"{name}: {100 * share:.2f}% of {what} equal to {parity.against}")
            work.monitor.detail(f"{runtime}, {len(work.data.test)} samples ({time.perf_counter() - started:.1f} s)")


def measure_all(work: Run, variants: Sequence[Variant]) -> None:
    """Metric, latency in turns, memory and profile of each artifact; every timed call is written down."""
    work.monitor.stage("measure")
    settings = work.recipe.measure
    places = [(variant, runtime) for variant in variants for runtime in variant.artifacts]
    with work.monitor.steps("measuring", 2 * len(places) + 1) as advance:
        found = measure(
            [variant.artifacts[runtime] for variant, runtime in places],
            work.batches(work.data.test),
            work.metric,
            settings.threads,
            settings.batch,
            on_step=advance,
        )
        for (variant, runtime), measurement in zip(places, found, strict=True):
            variant.measured[runtime] = measurement
            variant.memory[runtime] = peak_memory(variant.artifacts[runtime], settings.threads)
            variant.profile[runtime] = profile_ops(variant.artifacts[runtime], settings.threads, settings.batch)
            samples = measurement.latency.samples_ms
            lines = "".join(f"{sample:.6f}\n" for sample in samples)
            write_atomically(work.folder / samples_path(variant, runtime), "ms\n" + lines)
            work.monitor.detail(
                f"{variant.name}, {runtime}: {statistics.median(samples):.3f} ms at p50 of {len(samples)} calls"
            )
            advance()
