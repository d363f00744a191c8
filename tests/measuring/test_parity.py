from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import onnx.numpy_helper
import pytest
import torch

import edgeqat as eq
from edgeqat.errors import DataError, TamperedError
from edgeqat.measuring.parity import _Tally, compare_float
from edgeqat.replay.script import replay
from helpers import EXACT_ARITHMETIC
from models import FloatMiddle, SmallNet, shake

IMAGE = torch.randn(32, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def program() -> eq.QuantizedProgram:
    torch.manual_seed(0)
    sim = eq.calibrate(eq.prepare(shake(SmallNet()).eval(), IMAGE), [IMAGE])
    return eq.convert(sim)


@pytest.fixture
def artifact(program: eq.QuantizedProgram, tmp_path: Path) -> eq.Artifact:
    return eq.lower(program, "onnxruntime", tmp_path / "artifact")


@EXACT_ARITHMETIC
def test_an_honest_artifact_is_bit_identical(artifact: eq.Artifact, program: eq.QuantizedProgram) -> None:
    parity = eq.verify(artifact, program, [IMAGE[:20], IMAGE[20:]])
    assert parity == dataclasses.replace(
        parity,
        against="reference:onnxruntime/x86",
        n=32,
        bit_identical=1.0,
        max_error_steps=0.0,
        agreement=1.0,
        first_difference=None,
        exact_here=True,
    )


def change(artifact: eq.Artifact, name: str, index: int) -> None:
    """Changes one element of an integer initializer by one."""
    model = onnx.load(artifact.path)
    tensor = next(t for t in model.graph.initializer if t.name == name)
    array = onnx.numpy_helper.to_array(tensor).copy()
    flat = array.reshape(-1)
    flat[index] += 1 if flat[index] < 100 else -1
    tensor.CopyFrom(onnx.numpy_helper.from_array(array, name))
    artifact.path.write_bytes(model.SerializeToString())


def largest(program: eq.QuantizedProgram, name: str) -> int:
    data = program.consts[name].data
    assert data is not None
    return int(data.flatten().abs().argmax())


@EXACT_ARITHMETIC
@pytest.mark.parametrize("layer", ["conv1", "conv2", "conv3"])
def test_one_changed_weight_is_named_at_its_op(
    artifact: eq.Artifact, program: eq.QuantizedProgram, layer: str
) -> None:
    change(artifact, f"{layer}.weight", largest(program, f"{layer}.weight"))
    with pytest.raises(TamperedError, match=r"model\.onnx has sha256"):
        eq.verify(artifact, program, [IMAGE])
    parity = eq.verify(artifact, program, [IMAGE], check_hashes=False)
    assert parity.first_difference == layer
    assert parity.max_error_steps >= 1.0  # the logits may still be equal: later clamps can absorb it
    wrong = [value for value in parity.values if value.bit_identical < 1.0]
    assert (wrong[0].name, wrong[0].op) == (layer, layer)
    assert parity.max_error_steps == max(value.max_error_steps for value in wrong)
    assert sum(parity.histogram.values()) == sum(value.n for value in parity.values)
    assert f"the first op that differs is {layer}\n  {layer}: " in str(parity)


@EXACT_ARITHMETIC
def test_a_changed_last_layer_is_named_by_its_float_output(
    artifact: eq.Artifact, program: eq.QuantizedProgram
) -> None:
    change(artifact, "fc.weight", largest(program, "fc.weight"))
    parity = eq.verify(artifact, program, [IMAGE], check_hashes=False)
    assert parity.first_difference == "fc" and parity.max_error_steps == 0.0
    assert parity.output_error > 0 and set(parity.histogram) == {0}
    assert str(parity).endswith("values inside: every integer equal\nthe first op that differs is fc")


@EXACT_ARITHMETIC
def test_one_changed_scale_is_named_at_the_op_that_makes_the_value(
    artifact: eq.Artifact, program: eq.QuantizedProgram
) -> None:
    """The scale of the second conv's output, 1% up: that conv is the first op whose integers change."""
    model = onnx.load(artifact.path)
    quantize = next(n for n in model.graph.node if n.op_type == "QuantizeLinear" and n.output[0] == "conv2")
    tensor = next(t for t in model.graph.initializer if t.name == quantize.input[1])
    scale = onnx.numpy_helper.to_array(tensor) * np.float32(1.01)
    tensor.CopyFrom(onnx.numpy_helper.from_array(np.asarray(scale, np.float32), tensor.name))
    artifact.path.write_bytes(model.SerializeToString())
    parity = eq.verify(artifact, program, [IMAGE], check_hashes=False)
    assert parity.first_difference == "conv2"


@EXACT_ARITHMETIC
def test_one_changed_bias_is_named(artifact: eq.Artifact, program: eq.QuantizedProgram) -> None:
    # One step of a bias is far below one step of the output, so it is moved by many.
    model = onnx.load(artifact.path)
    tensor = next(t for t in model.graph.initializer if t.name == "conv3:bias")
    array = onnx.numpy_helper.to_array(tensor).copy()
    array[0] += 5000
    tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    artifact.path.write_bytes(model.SerializeToString())
    assert eq.verify(artifact, program, [IMAGE], check_hashes=False).first_difference == "conv3"


def test_a_float_artifact_is_compared_with_its_model(tmp_path: Path) -> None:
    model = shake(SmallNet()).eval()
    island = eq.prepare(model, IMAGE, qconfig_mapping=eq.QConfigMapping().set_global(None))
    artifact = eq.lower(eq.convert(island), "onnxruntime", tmp_path / "float")
    parity = compare_float(artifact, model, [IMAGE])
    assert (parity.against, parity.agreement, parity.n) == ("simulation", 1.0, 32)
    assert not parity.exact_here


@EXACT_ARITHMETIC
def test_values_behind_a_float_island_are_compared_in_steps(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sim = eq.calibrate(eq.prepare(FloatMiddle().eval(), IMAGE), [IMAGE])
    program = eq.convert(sim)
    artifact = eq.lower(program, "onnxruntime", tmp_path / "middle")
    exact = {row["value"]: row["exact"] for row in artifact.manifest["checks"]}
    assert exact["first"] and not exact["last"]
    assert [entry["owed"] for entry in artifact.manifest["outputs"].values()] == ["reported"]
    assert replay(artifact.folder).passed  # a step more or less there is no failure, since nothing is owed
    # tanh's last bit may move a value by one step, and the conv behind it by a few.
    assert eq.verify(artifact, program, [IMAGE]).max_error_steps <= 4.0


def test_no_batches_are_refused(artifact: eq.Artifact, program: eq.QuantizedProgram) -> None:
    with pytest.raises(DataError, match="found no batches to verify with"):
        eq.verify(artifact, program, [])


# Agreement, by what outputs mean.


def agreement(found: list[torch.Tensor], expected: list[torch.Tensor], classes: bool = True) -> float:
    whole, parts = _Tally(classes), _Tally(classes)
    whole.add(found, expected)
    for i in range(len(found[0])):
        parts.add([t[i : i + 1] for t in found], [t[i : i + 1] for t in expected])
    assert parts.shares() == pytest.approx(whole.shares()), "however samples are batched"
    return whole.shares()[1]


def test_scores_agree_by_their_largest_entry() -> None:
    a, b = torch.tensor([[1.0, 9.0], [3.0, 2.0]]), torch.tensor([[1.0, 1.1], [2.0, 3.0]])
    assert agreement([a], [b]) == 0.5
    assert agreement([a, b], [a, a]) == 1.0  # the first output alone


def test_pixels_agree_by_their_share() -> None:
    a = torch.zeros(2, 3, 2, 2)
    b = a.clone()
    b[0, 1, 0, 0] = 1.0
    assert agreement([b], [a]) == pytest.approx(7 / 8)


@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_one_figure_a_sample_agrees_within_a_step_of_its_range(shape: tuple[int, ...]) -> None:
    """0 to 255: a step is 1. An argmax over one entry would call any two models equal."""
    expected = torch.tensor([0.0, 100.0, 200.0, 255.0]).reshape(shape)
    found = expected + torch.tensor([1.0, -1.0, 1.01, 90.0]).reshape(shape)
    assert agreement([found], [expected]) == 0.5
    assert agreement([expected], [expected]) == 1.0


def test_without_classes_every_output_must_be_near() -> None:
    boxes = torch.tensor([[0.0, 255.0], [10.0, 20.0]])
    other = boxes + torch.tensor([[0.0, 0.0], [0.0, 2.0]])
    assert agreement([other], [boxes], classes=True) == 1.0
    assert agreement([other], [boxes], classes=False) == 0.5
    assert agreement([boxes, other], [boxes, boxes], classes=False) == 0.5


def test_nan_agrees_with_nothing() -> None:
    nan = torch.full((2, 1), float("nan"))
    assert agreement([nan], [nan]) == 0.0
