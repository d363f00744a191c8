"""Runs with live and frozen batch norms and with learned ranges, from end to end, stopped and resumed too."""

from __future__ import annotations

from pathlib import Path

import pytest

import edgeqat as eq
from edgeqat.recipe import Recipe, load_recipe
from edgeqat.reporting.monitor import Silent
from helpers import EXACT_ARITHMETIC, digests

SETTINGS = [
    "data.image_size=8",
    "data.calibration_n=900",  # leaves 178 images to train on
    "train.float_epochs=1",
    "train.qat_epochs=2",
    "export=[onnxruntime, torchscript]",
    "gate={max_drop: null, min_size_ratio: null, min_agreement: null}",
]
KINDS = {
    "live": ["quantize.batch_norm=live", "train.reestimate_batches=2"],
    "frozen": ["quantize.batch_norm=frozen", "train.freeze_batch_norm_after=1"],
    "learned": ["quantize.activations.learned=true", "quantize.weights={learned: true, bits: 6}"],
    "learned, live": [
        "quantize.batch_norm=live",
        "quantize.activations.learned=true",
        "quantize.weights.learned=true",
    ],
}


pytestmark = pytest.mark.usefixtures("few_rounds")


def recipe(kind: str) -> Recipe:
    return load_recipe("digits-edge", [*SETTINGS, *KINDS[kind]])


class StopInQat(Silent):
    """Interrupts after the first epoch of quantization-aware training."""

    def __init__(self) -> None:
        self._armed = False

    def stage(self, text: str) -> None:
        self._armed = self._armed or text.startswith("quantization-aware")

    def line(self, text: str) -> None:
        if self._armed and text.startswith("epoch 1/"):
            raise KeyboardInterrupt


@EXACT_ARITHMETIC
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_trained_is_what_runs_and_a_resumed_run_has_the_same_bytes(tmp_path: Path, kind: str) -> None:
    report = eq.run(recipe(kind), tmp_path / "whole")
    rows = [row for row in report.results if row.variant in ("ptq", "qat") and row.runtime != "simulation"]
    assert len(rows) == 4
    for row in rows:
        assert row.parity is not None and row.parity.bit_identical == 1.0 and row.parity.max_error_steps == 0.0
        assert row.ops is not None and row.ops.float == 0
    with pytest.raises(KeyboardInterrupt):
        eq.run(recipe(kind), tmp_path / "stopped", monitor=StopInQat())
    eq.run(recipe(kind), tmp_path / "stopped", resume=True)
    for part in ("artifacts", "checkpoints"):
        expected, found = digests(tmp_path / "whole" / part), digests(tmp_path / "stopped" / part)
        bytes_that_count = [name for name in expected if not name.endswith(".json") or part == "artifacts"]
        assert {n: found.get(n) for n in bytes_that_count} == {n: expected[n] for n in bytes_that_count}
