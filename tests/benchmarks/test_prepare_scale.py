from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

import prepare_scale


def test_it_prints_and_writes_how_set_up_grows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "figures.json"
    words = "--depths 14 8 --no-resnet50 --repeats 1 --threads 1"
    monkeypatch.setattr(sys, "argv", ["prepare_scale.py", *words.split(), "--json", str(report)])
    threads = torch.get_num_threads()
    try:
        prepare_scale.main()
    finally:
        torch.set_num_threads(threads)
    found = json.loads(report.read_text())
    assert found["layers"] == {"ResNet-8, 3x32x32": 8, "ResNet-14, 3x32x32": 14}
    runs = [found["seconds"][name][0] for name in found["layers"]]
    for run in runs:
        assert run["together"] == pytest.approx(sum(run[stage] for stage in prepare_scale.STAGES))
    for stage, growth in found["growth"].items():
        assert growth == pytest.approx((runs[1][stage] / 14) / (runs[0][stage] / 8))
    assert "seconds a layer, ResNet-14, 3x32x32 by ResNet-8, 3x32x32: prepare " in capsys.readouterr().out


def test_a_depth_that_no_resnet_has_is_refused() -> None:
    with pytest.raises(SystemExit, match="found depth 21, wanted 6 n \\+ 2"):
        prepare_scale.resnet_cifar(21)


def test_resnet_50_is_the_one_of_the_paper() -> None:
    model = prepare_scale.ResNet50()
    assert sum(p.numel() for p in model.parameters()) == 25_557_032
    with torch.no_grad():
        assert model.eval()(torch.zeros(1, 3, 64, 64)).shape == (1, 1000)
