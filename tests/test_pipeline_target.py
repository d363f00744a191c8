"""A run that exports for a target of one's own beside ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import edgeqat as eq
from edgeqat.factory import build_model
from edgeqat.lowering.artifact import load_artifact
from edgeqat.measuring import latency, memory
from edgeqat.recipe import load_recipe
from edgeqat.training_stages import plan_hash
from helpers import EXACT_ARITHMETIC
from own_targets import write_target

STRICT = "activations: {symmetric: true, power_of_two: true}\nweights: {per_channel: false, power_of_two: true}\n"


@EXACT_ARITHMETIC
def test_a_run_proves_and_measures_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MIN_ROUNDS", "MAX_ROUNDS"):  # how often is measured is not what is tested here
        monkeypatch.setattr(latency, name, 5)
    monkeypatch.setattr(memory, "PROCESSES", 1)
    target = write_target(tmp_path, STRICT)
    settings = [
        f"export=[{target}, onnxruntime]",
        "data.image_size=8",
        "data.calibration_n=900",
        "train.float_epochs=1",
        "train.qat_epochs=1",
        "gate={max_drop: null, min_size_ratio: null, min_speedup: null, min_agreement: 0.0, runtimes: [my-npu]}",
    ]
    report = eq.run(load_recipe("digits-edge", settings), tmp_path / "out")
    assert {row.runtime for row in report.results} == {"simulation", "my-npu", "onnxruntime"}
    for row in report.results:
        if row.runtime != "simulation" and row.variant in ("ptq", "qat"):
            assert row.parity is not None and row.parity.bit_identical == 1.0, row
    artifact = load_artifact(tmp_path / "out" / "artifacts" / "qat" / "my-npu")
    assert (artifact.runtime, artifact.manifest["target"]) == ("onnxruntime", "my-npu")
    assert {check.runtime for check in report.gate.checks} == {"my-npu"}


def test_a_run_is_not_resumed_for_a_target_that_changed(tmp_path: Path) -> None:
    target = write_target(tmp_path, "")
    recipe = load_recipe("digits-edge", [f"export=[{target}]", "data.image_size=8", "data.calibration_n=900"])
    model = build_model(recipe.model, 0)
    example = torch.zeros(2, 3, 8, 8)
    hashes = set()
    for text in ("", "activations: {symmetric: true}\n", STRICT, "weights: {power_of_two: true}\n"):
        write_target(tmp_path, text)
        hashes.add(plan_hash(eq.plan(model, example, recipe.export)))
    assert len(hashes) == 4
    assert eq.plan(model, example).program.plan_hash == plan_hash(eq.plan(model, example))
