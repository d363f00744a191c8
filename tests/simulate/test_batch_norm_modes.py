"""Every batch norm of the table, live and frozen: trained behind quantized weights, to the integers of the runtime."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.modules.batchnorm import _BatchNorm

import edgeqat as eq
from batch_norm_cases import CASES, EXPECTED_WARNING, BatchNormCase
from helpers import EXACT_ARITHMETIC

pytestmark = pytest.mark.filterwarnings(EXPECTED_WARNING)

SCHEDULES = {"live": eq.BatchNormSchedule(), "frozen": eq.BatchNormSchedule(freeze_after=0)}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_without_quantization_a_live_batch_norm_changes_no_bit(case: BatchNormCase) -> None:
    model, x = case.factory(), case.example()
    sim = eq.prepare(model, x, batch_norm="live")
    with torch.no_grad():
        assert torch.equal(sim(x), model(x))


@EXACT_ARITHMETIC
@pytest.mark.parametrize("mode", SCHEDULES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_was_trained_is_what_runs(case: BatchNormCase, mode: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = case.factory(), case.example(8)
    wanted = [(m.eps, m.momentum) for m in model.modules() if isinstance(m, _BatchNorm)]
    sim = eq.calibrate(eq.prepare(model, x, batch_norm="live"), [x])
    with torch.no_grad():
        target = model(x) * 0.9
    moving = {name: p.detach().clone() for name, p in sim.named_parameters()}
    batches = [(x, target), (case.example(8, seed=1), target)]
    eq.fit(sim, batches, epochs=1, lr=0.01, loss="mse", max_grad_norm=1.0, batch_norm=SCHEDULES[mode])
    assert any(not torch.equal(p.detach(), moving[name]) for name, p in sim.named_parameters())
    assert [(m.eps, m.momentum) for m in sim.to_float().modules() if isinstance(m, _BatchNorm)] == wanted
    program = eq.convert(sim)
    artifact = eq.lower(program, "onnxruntime", tmp_path / "artifact")
    test = [case.example(3, seed=2), case.example(1, seed=3)]
    parity = eq.verify(artifact, program, test)
    if case.folds:
        assert (parity.bit_identical, parity.max_error_steps, parity.first_difference) == (1.0, 0.0, None)
        return
    owed = [row["value"] for row in artifact.manifest["checks"] if row["exact"]]
    assert owed
    for batch in test:
        _, values = eq.reference(program, batch, taps=True)
        _, found = artifact.session().run_with_taps([batch])
        assert all((found[name] == values[name]).all() for name in owed)
