"""Runs with every aid, from end to end, stopped in each stage and resumed too; and what is refused before training."""

from __future__ import annotations

from pathlib import Path

import pytest

import edgeqat as eq
from edgeqat.errors import PlanError, RecipeError
from edgeqat.recipe import Recipe, load_recipe
from edgeqat.reporting.monitor import Silent
from helpers import EXACT_ARITHMETIC, digests
from own_targets import write_target

SETTINGS = [
    "data.image_size=8",
    "data.calibration_n=900",  # leaves 178 images to train on
    "train.float_epochs=1",
    "train.qat_epochs=2",
    "train.qat_lr=0.02",
    "quantize.weights={bits: 4, learned: true}",
    "gate={max_drop: null, min_size_ratio: null, min_agreement: null}",
]
OSCILLATION = "train.oscillation={momentum: 0.3, freeze: {begin: 0.0}, dampen: {begin: 0.5, shape: linear}}"
KINDS = {
    "folded": [
        "quantize.first_last={weights: {learned: true}}",
        "train.distill={weight: 0.5, temperature: 2.0}",
        "train.ema={decay: 0.8}",
        OSCILLATION,
        "train.progressive=[{weights: 8, epochs: 1}, {weights: 6, activations: 8, epochs: 1}]",
    ],
    "live, pixels": [
        "quantize.batch_norm=live",
        "quantize.weights={bits: 4}",
        "data.input=pixels",
        "train.distill={}",
        "train.ema={decay: 0.8, reestimate_batches: 2}",
        OSCILLATION,
    ],
}


pytestmark = pytest.mark.usefixtures("few_rounds")


def recipe(*more: str) -> Recipe:
    return load_recipe("digits-edge", [*SETTINGS, *more])


class Told(Silent):
    """Remembers what it was told; interrupts at the first line that begins with some words, in its n-th stage."""

    def __init__(self, words: str = "never", stage: str = "") -> None:
        self._words, self._stage, self._armed = words, stage, not stage
        self.told: list[str] = []

    def stage(self, text: str) -> None:
        self._armed = self._armed or text.startswith(self._stage)
        self.line(text)

    def line(self, text: str) -> None:
        self.told.append(text)
        if self._armed and text.startswith(self._words):
            raise KeyboardInterrupt


STOPS = {
    "folded": [
        Told("quantization-aware training, 1 epochs, 8-bit weights or more"),
        Told("quantization-aware training, 1 epochs, 6-bit weights and 8-bit activations or more"),
        Told("epoch 1/", "quantization-aware training, 2"),
    ],
    "live, pixels": [Told("epoch 1/", "quantization-aware")],
}


@EXACT_ARITHMETIC
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_trained_is_what_runs_and_a_resumed_run_has_the_same_bytes(tmp_path: Path, kind: str) -> None:
    told = Told()
    report = eq.run(recipe(*KINDS[kind]), tmp_path / "whole", monitor=told)
    rows = [row for row in report.results if row.variant in ("ptq", "qat") and row.runtime != "simulation"]
    assert all(row.parity is not None and row.parity.bit_identical == 1.0 for row in rows) and len(rows) == 2
    watched = [line for line in told.told if line.startswith("oscillating weights")]
    if kind == "folded":
        assert watched[:2] == ["oscillating weights: none has few enough bits to be watched"] * 2
        budgets = [line for line in told.told if line.startswith("fine-tune the float twin")]
        assert budgets == [f"fine-tune the float twin, {n} epochs" for n in (1, 1, 2)]
    assert " more frozen; most in " in watched[-1]
    for stop in STOPS[kind]:
        with pytest.raises(KeyboardInterrupt):
            eq.run(recipe(*KINDS[kind]), tmp_path / "stopped", monitor=stop, resume=True)
    eq.run(recipe(*KINDS[kind]), tmp_path / "stopped", resume=True)
    for part in ("artifacts", "checkpoints"):
        expected, found = digests(tmp_path / "whole" / part), digests(tmp_path / "stopped" / part)
        bytes_that_count = [name for name in expected if not name.endswith(".json") or part == "artifacts"]
        assert {n: found.get(n) for n in bytes_that_count} == {n: expected[n] for n in bytes_that_count}


NUMBERS = """
import torch

def part(n):
    return torch.randn(n, 3, 8, 8), torch.randn(n, 1)

def data():
    return {"train": part(200), "test": part(20)}
"""


def test_distillation_without_classes_is_refused_before_training(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(NUMBERS, encoding="utf-8")
    own = [f"data.source={tmp_path}/mine.py:data", "data.augment=null", "data.calibration_n=32"]
    own += ["model.args.num_classes=1", "task={loss: mse, metric: mae}", "train.distill={}"]
    with pytest.raises(
        RecipeError, match="train.distill: distillation compares class scores, and targets are float32"
    ):
        eq.run(recipe(*own), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_stage_that_a_target_does_not_take_is_refused_before_training(tmp_path: Path) -> None:
    target = write_target(tmp_path, "weights: {bits: [4, 8]}")
    own = [f"export=[{target}]", "train.progressive=[{weights: 6, epochs: 1}]"]
    with pytest.raises(PlanError, match="found 6-bit weights, but my-npu takes 4, 8 bits"):
        eq.run(recipe(*own), tmp_path / "run")
    assert not (tmp_path / "run").exists()
