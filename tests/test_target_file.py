"""Files that describe a target: what they say, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import edgeqat as eq
from edgeqat.errors import PlanError
from edgeqat.program import Kind
from edgeqat.recipe import load_recipe
from edgeqat.target_file import load_target_file
from edgeqat.target_rules import resolve_targets
from edgeqat.target_table import ALL_KINDS
from helpers import CommandLine
from own_targets import write_target

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_a_name_alone_allows_what_onnx_runtime_does(tmp_path: Path) -> None:
    (rule,) = resolve_targets(write_target(tmp_path))
    (known,) = resolve_targets("onnxruntime")
    for field in ("kinds", "weight_bits", "conv_dims", "pools_keep_grid", "storage"):
        assert getattr(rule, field) == getattr(known, field), field
    assert (rule.name, rule.runtime, rule.spelled) == ("my-npu", "onnxruntime", str(tmp_path / "my-npu.yaml"))
    assert rule.activation_bits == {8} and not rule.float_logits


def test_every_key_means_something(tmp_path: Path) -> None:
    text = """
note: mine
activations: {bits: [4, 8], symmetric: true, power_of_two: true}
weights: {bits: [4], per_channel: false, power_of_two: true}
ops: [conv, view]
conv_dims: [1]
float_logits: true
pools_keep_grid: true
storage: int8
"""
    (rule,) = resolve_targets(write_target(tmp_path, text))
    assert (rule.note, rule.activation_bits, rule.weight_bits) == ("mine", {4, 8}, {4})
    assert rule.kinds == {Kind.CONV, Kind.VIEW, Kind.QUANTIZE, Kind.DEQUANTIZE}
    assert rule.conv_dims == {1} and rule.float_logits and rule.pools_keep_grid and rule.centred
    assert rule.symmetric_activations and rule.power_of_two_activations and rule.power_of_two_weights
    assert not rule.per_channel_weights
    assert rule.kinds < ALL_KINDS


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("activation: {}", "unknown key activation; did you mean activations"),
        ("weights: {perchannel: true}", "unknown key weights.perchannel; did you mean per_channel"),
        ("ops: [conv, linaer]", "unknown op 'linaer'; did you mean linear"),
        ("ops: [quantize]", "unknown op 'quantize'; wanted one of conv"),
        ("ops: [[conv]]", r"unknown op \['conv'\]"),
        ("activations: {bits: [16]}", "activations.bits.0: found 16"),
        ("activations: {bits: []}", r"activations.bits: found \[\]"),
        ("storage: float16", "storage: found 'float16'"),
        ("name: my-npu", "found the key name twice"),
        ("ops: [conv", "is not valid YAML"),
    ],
)
def test_what_does_not_fit_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = write_target(tmp_path, text)
    with pytest.raises(PlanError, match=message) as error:
        resolve_targets(path)
    assert "\n" not in str(error.value) and path in str(error.value)


@pytest.mark.parametrize("name", ["onnxruntime", "torchscript", "portable", "openvino", "aoti"])
def test_a_known_name_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(PlanError, match="which edgeqat knows already"):
        resolve_targets(write_target(tmp_path, name=name))


@pytest.mark.parametrize("content", ["name: a/b", "name: ..", "name: 5", "[]", "", "name: ''"])
def test_a_name_is_wanted_that_a_folder_can_have(tmp_path: Path, content: str) -> None:
    path = tmp_path / "odd.yml"
    path.write_text(content)
    with pytest.raises(PlanError, match=r"odd\.yml: "):
        load_target_file(str(path))


def test_two_files_of_one_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    paths = [write_target(tmp_path), write_target(tmp_path / "other")]
    with pytest.raises(PlanError, match="have the name 'my-npu'; rename one of them"):
        resolve_targets(paths)
    assert len(resolve_targets([paths[0], paths[0], "onnxruntime"])) == 2


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "folder.yaml").mkdir()
    for name in ("none.yaml", "folder.yaml"):
        with pytest.raises(PlanError, match=f"{name} cannot be read: .*; wanted a YAML file"):
            eq.plan(torch.nn.Conv2d(3, 4, 1), torch.zeros(1, 3, 4, 4), target=str(tmp_path / name))


def test_a_path_in_a_recipe_is_relative_to_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("export: [onnxruntime, npu.yaml]\n")
    recipe = load_recipe(str(tmp_path / "recipe.yaml"))
    assert recipe.export == ["onnxruntime", str(tmp_path / "npu.yaml")]


def test_the_command_line_ends_with_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "recipe.yaml").write_text("export: [npu.yaml]\n")
    run = CommandLine(monkeypatch, capsys)
    assert "npu.yaml cannot be read" in run("inspect", tmp_path / "recipe.yaml").refusal(2)
    write_target(tmp_path, "operators: [conv]", "npu")
    assert "unknown key operators" in run("inspect", tmp_path / "recipe.yaml").refusal(2)
    write_target(tmp_path, "ops: [conv]", "npu")
    ended = run("inspect", tmp_path / "recipe.yaml")
    assert ended.code == 0 and "npu has no integer add" in ended.out


def test_the_example_is_valid() -> None:
    assert load_target_file(str(EXAMPLES / "npu.yaml")).name == "my-npu"
