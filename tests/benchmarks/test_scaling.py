from __future__ import annotations

import json
import sys

import pytest
import torch

import capacity
import scaling
from edgeqat.processes import Team


def test_a_process_measures_its_steps() -> None:
    found = scaling.measured(Team(), depth=8, side=32, steps=scaling.WARM_UP + 2, n=scaling.BATCH * 8, quantized=False)
    assert found["images_s"] == pytest.approx(scaling.BATCH / found["step_s"])  # of one step after the first ones
    assert found["mib"] > 100


def test_growth_is_told_by_depth_side_and_samples(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(scaling, "DEPTHS", (8,))
    monkeypatch.setattr(scaling, "SIDES", (32,))
    monkeypatch.setattr(scaling, "SAMPLES", (256 * 4,))
    monkeypatch.setattr(scaling, "one_process", lambda *_: {"step_s": 0.5, "mib": 400.0})
    monkeypatch.setattr(sys, "argv", ["scaling.py", "growth"])
    scaling.main()
    told = capsys.readouterr().out
    assert "           8 |     500.0 |               62.50 | 400" in told
    assert "                      1024 |     500.0 |          4 | 400, 3" in told


def test_an_estimate_is_images_by_rate(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(capacity, "cost", lambda *_: (1.0, 1.5, [1.5, 1.25, 1.75]))
    monkeypatch.setattr(sys, "argv", ["capacity.py", "--rates", "1000", "--epochs", "2", "--efficiency", "0.5"])
    capacity.main()
    told = capsys.readouterr().out
    alone = capacity.IMAGES * 2 * 1.5 / 1000 / 3600
    assert f"1 GPU {alone:.2f} h, 8 GPUs {alone / 4:.2f} h, 64 GPUs {alone / 32:.2f} h" in told
    assert "ratio 1.50 (1.25 to 1.75, 8 rounds)" in told


def test_a_step_trains() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 1000))
    before = model[2].weight.clone()
    capacity.step_of(model, 2)()
    assert not torch.equal(model[2].weight, before)
    assert json.dumps(capacity.GPUS) == "[1, 8, 64]"
