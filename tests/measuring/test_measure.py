from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import edgeqat as eq
from edgeqat.errors import DataError, InputError
from edgeqat.lowering.to_onnx import payload_bytes, spell_model
from edgeqat.measuring.latency import MAX_ROUNDS, MIN_ROUNDS, measure_latency
from helpers import EXACT_ARITHMETIC
from models import Branches, SmallNet, shake

IMAGE = torch.randn(30, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[eq.Artifact, eq.Artifact, eq.QuantizedProgram]:
    torch.manual_seed(0)
    model, folder = shake(SmallNet()).eval(), tmp_path_factory.mktemp("artifacts")
    island = eq.prepare(model, IMAGE, qconfig_mapping=eq.QConfigMapping().set_global(None))
    program = eq.convert(eq.calibrate(eq.prepare(model, IMAGE), [IMAGE]))
    return (
        eq.lower(eq.convert(island), "onnxruntime", folder / "float"),
        eq.lower(program, "onnxruntime", folder / "int8"),
        program,
    )


@EXACT_ARITHMETIC
def test_one_code_path_measures_float_and_int8(
    pair: tuple[eq.Artifact, eq.Artifact, eq.QuantizedProgram],
) -> None:
    floating, integer, program = pair
    logits = eq.reference(program, IMAGE)
    targets = logits.argmax(1)
    targets[:6] = (targets[:6] + 1) % 10  # six of thirty are wrong by construction
    results = eq.measure([floating, integer], [(IMAGE[:20], targets[:20]), (IMAGE[20:], targets[20:])])
    assert [r.artifact for r in results] == [floating, integer]
    assert results[1].metric.value == pytest.approx(24 / 30) and results[1].metric.n == 30
    assert results[1].scores.statistics.tolist() == [False] * 6 + [True] * 24
    assert results[1].file_bytes == integer.path.stat().st_size < results[0].file_bytes
    assert results[1].payload_bytes == payload_bytes(spell_model(program)) < results[1].file_bytes
    for result in results:
        latency = result.latency
        assert MIN_ROUNDS <= len(latency.samples_ms) <= MAX_ROUNDS
        assert (latency.batch, latency.threads) == (1, 1)
        assert 0 < latency.percentile(50) <= latency.percentile(90) <= latency.percentile(99)
    assert len(results[0].latency.samples_ms) == len(results[1].latency.samples_ms)  # interleaved


def test_latency_is_of_the_batch_asked_for(
    pair: tuple[eq.Artifact, eq.Artifact, eq.QuantizedProgram], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgeqat.measuring.latency.BUDGET_S", 0.0)
    found = measure_latency({"a": pair[0]}, {"a": [IMAGE[:7]]}, threads=1)
    assert found["a"].batch == 7 and len(found["a"].samples_ms) == MIN_ROUNDS


@EXACT_ARITHMETIC
def test_an_artifact_returns_the_model_s_own_structure(
    pair: tuple[eq.Artifact, eq.Artifact, eq.QuantizedProgram],
) -> None:
    _, integer, program = pair
    assert torch.equal(integer.run(IMAGE), eq.reference(program, IMAGE))
    loaded = eq.load_artifact(integer.folder)
    assert torch.equal(loaded.run({"x": IMAGE})[0], integer.run(IMAGE))
    assert loaded.runtime == "onnxruntime"


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"artifacts": []}, InputError, "found no artifacts"),
        ({"metric": "f1"}, InputError, "found the metric 'f1'"),
        ({"eval_batches": []}, DataError, "found no batches to evaluate on"),
        ({"batch": 31}, DataError, "found fewer than 31 samples to time"),
    ],
    ids=["artifacts", "metric", "batches", "batch"],
)
def test_bad_input_is_named(
    pair: tuple[eq.Artifact, eq.Artifact, eq.QuantizedProgram],
    settings: dict[str, object],
    error: type[Exception],
    message: str,
) -> None:
    batches = [(IMAGE, torch.zeros(30, dtype=torch.long))]
    arguments: dict[str, object] = {"artifacts": [pair[0]], "eval_batches": batches} | settings
    with pytest.raises(error, match=message):
        eq.measure(**arguments)  # type: ignore[arg-type]


def first_map(outputs: Any, targets: Any) -> torch.Tensor:
    return (outputs["map"] - targets).abs().flatten(1).mean(1)


first_map.higher_is_better = False  # type: ignore[attr-defined]


def test_a_metric_gets_every_output_by_its_name(tmp_path: Path) -> None:
    model, pair = Branches().eval(), (IMAGE[:8], IMAGE[8:16])
    island = eq.convert(eq.prepare(model, pair, qconfig_mapping=eq.QConfigMapping().set_global(None)))
    artifact = eq.lower(island, "onnxruntime", tmp_path / "branches")
    with torch.no_grad():
        targets = model(*pair)["map"] + 0.5
    found = eq.measure([artifact], [(pair, targets)], first_map)[0]
    assert found.metric.value == pytest.approx(0.5, abs=1e-5) and found.metric.n == 8
    with pytest.raises(DataError, match="the model returns a dict, and the metric mae takes one tensor"):
        eq.measure([artifact], [(pair, targets)], "mae")


def test_a_loaded_artifact_of_one_output_is_measured_alike(
    pair: tuple[eq.Artifact, eq.Artifact, eq.QuantizedProgram],
) -> None:
    loaded = eq.load_artifact(pair[0].folder)
    batches = [(IMAGE, torch.arange(30) % 10)]
    own, again = (eq.measure([artifact], batches)[0] for artifact in (pair[0], loaded))
    assert torch.equal(own.scores.statistics, again.scores.statistics)
