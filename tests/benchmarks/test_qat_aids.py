"""The ablation of the aids: every variant runs on a few images, and a finished one is not run again."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

import qat_aids
from edgeqat.data.sources import load
from helpers import EXACT_ARITHMETIC


def options(folder: Path) -> argparse.Namespace:
    return argparse.Namespace(out=folder, seeds=[0], epochs=4, float_epochs=1, train_n=64, test_n=32, activations=8)


@EXACT_ARITHMETIC
def test_variants_run_and_the_table_holds_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = load("digits", image_size=16, mean=None, std=None, calibration_n=64)
    for aid in (qat_aids.FLOAT, "none", "progressive", "all"):
        found = qat_aids.run(aid, 0, options(tmp_path), data)
        (tmp_path / f"{aid}-0.json").write_text(json.dumps({"settings": {}} | found))
        assert 0.0 <= found["top1"] <= 1.0
    assert len(list(tmp_path.glob("float-64x1-0.safetensors"))) == 1
    qat_aids.print_table(options(tmp_path), {})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| float", "| none", "| progressive", "| all"]
    assert lines[3].split(" | ")[4] == "+0.00"
    with pytest.raises(SystemExit, match="none-0.json was made with other settings"):
        qat_aids.finished(tmp_path / "none-0.json", {"epochs": 9})


def test_differences_are_paired() -> None:
    assert qat_aids.difference([1.0, 2.0, 3.0]) == ("+2.00", "-0.48 to +4.48")  # t = 4.303, sd = 1
    assert qat_aids.difference([0.5]) == ("+0.50", "")
