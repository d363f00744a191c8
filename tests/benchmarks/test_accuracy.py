from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import accuracy
import edgeqat as eq
from edgeqat.data.dataset import Dataset
from edgeqat.data.sources import load
from edgeqat.program import WEIGHTED, Kind, QuantizedProgram
from helpers import EXACT_ARITHMETIC
from runtimes import MODELS


def planned(network: str, setting: str) -> QuantizedProgram:
    mapping = accuracy.mapping(accuracy.NETWORKS[network], accuracy.SETTINGS[setting])
    return eq.plan(MODELS[network]().eval(), torch.randn(2, 3, 32, 32), "onnxruntime", mapping).program


def bits(program: QuantizedProgram, value: str) -> int:
    return program.grid_of(value).qmax.bit_length()


@pytest.mark.parametrize("network", list(accuracy.NETWORKS))
def test_a_setting_is_what_the_table_says_of_it(network: str) -> None:
    """First and last layer, the residual stream and what the last layer reads at 8 bits, all else at 4; no float."""
    program = planned(network, "w4a4")
    assert program.float_origins() == []
    layers = [op for op in program.ops if op.kind in WEIGHTED]
    weights = [program.consts[op.weight or ""].grid.qmax for op in layers]
    assert weights == [127, *[7] * (len(layers) - 2), 127]
    assert bits(program, layers[0].inputs[0]) == bits(program, layers[-1].inputs[0]) == 8
    added = {name for op in program.ops if op.kind is Kind.ADD for name in (*op.inputs, op.name)}
    assert {bits(program, name) for name in added} == {8}
    inner = {bits(program, op.name) for op in layers[1:-1] if op.name not in added}
    assert 4 in inner and (network == "mobilenetv2" or inner == {4})


@pytest.mark.parametrize(("setting", "weights", "values"), [("w8a8", 127, 8), ("w4a8-all", 7, 8), ("w4a4-all", 7, 4)])
def test_all_is_all(setting: str, weights: int, values: int) -> None:
    program = planned("resnet8", setting)
    assert {const.grid.qmax for name, const in program.consts.items()} == {weights}
    assert {bits(program, name) for name in program.tapped()} == {values}


def test_bits_of_right_and_wrong_come_back() -> None:
    found = torch.rand(10_000) < 0.9
    assert torch.equal(accuracy.unpacked(accuracy.packed(found), 10_000), found.double())


def test_a_drop_is_that_of_pairs_with_the_range_over_seeds() -> None:
    def result(wrong: int) -> dict[str, str]:
        found = torch.ones(10_000, dtype=torch.bool)
        found[:wrong] = False
        return {"right": accuracy.packed(found)}

    text = accuracy.drop([(result(0), result(30)), (result(10), result(20))])
    assert text.startswith("+0.20 (+0.1") and text.endswith("seeds +0.10 to +0.30")
    assert "seeds" not in accuracy.drop([(result(0), result(30))])


@pytest.fixture
def data() -> accuracy.Data:
    full = load("digits", image_size=32, mean=accuracy.MEAN, std=accuracy.STD, calibration_n=16)
    few = {name: getattr(full, name).take(torch.arange(64)) for name in ("train", "test")}
    return accuracy.Data(Dataset(**{**vars(full), **few}))


@EXACT_ARITHMETIC
def test_cells_are_made_once_and_go_on_from_ptq(
    data: accuracy.Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(accuracy, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(accuracy, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(accuracy, "FLOAT_EPOCHS", 1)
    monkeypatch.setattr(accuracy, "BATCH", 16)
    short = accuracy.Network(r"entry_block\.0", r"residual_block\.conv\.6", accuracy.Budget(1, 0.01))
    monkeypatch.setitem(accuracy.NETWORKS, "edge", short)
    accuracy.run("edge", ["w4a4"], [0], tmp_path, data, 1)
    made = {path.stem: path.stat().st_mtime_ns for path in (tmp_path / "results").iterdir()}
    assert set(made) == {"edge-float", "edge-w4a4-ptq", "edge-twin-0", "edge-w4a4-qat-0"}
    found = json.loads((tmp_path / "results" / "edge-w4a4-qat-0.json").read_text())
    assert (found["bit_identical"], found["max_error_steps"], found["float_ops"]) == (1.0, 0.0, 0)
    assert found["budget"] == "1x0.01" and 0.0 <= found["top1"] <= 1.0
    accuracy.run("edge", ["w4a4"], [0], tmp_path, data, 1)
    assert made == {path.stem: path.stat().st_mtime_ns for path in (tmp_path / "results").iterdir()}
    assert "edge-w4a4-qat-0: top1" in capsys.readouterr().out
