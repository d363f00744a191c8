"""Files for targets of one's own, run by ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

import edgeqat as eq
from edgeqat.errors import PlanError
from edgeqat.replay.script import replay
from edgeqat.zoo import edge_model
from helpers import EXACT_ARITHMETIC
from models import SmallNet, shake
from own_targets import converted_for, write_target

IMAGE = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
STRICT = "activations: {symmetric: true, power_of_two: true}\nweights: {per_channel: false, power_of_two: true}\n"
CENTRED = "activations: {symmetric: true}\nstorage: int8\n"
INT8_STEPS = 2
"""Layers over int8 activations are computed in float by ONNX Runtime: a value next to a tie lands one step away, and
the layer behind it may carry that on."""


class Moved(nn.Module):
    """Only ops that move integers or look them up, which owe every bit."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.randn(1, 3, 1, 1))
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = nn.functional.pad(torch.relu(x[:, :, 1:-1]), (1, 1, 1, 1))
        x = nn.functional.max_pool2d(torch.sigmoid(x), 2)
        x = torch.cat([x, x * self.shift + self.shift], 1)
        return nn.functional.interpolate(x.permute(0, 1, 3, 2), scale_factor=2, mode="nearest")


@EXACT_ARITHMETIC
@pytest.mark.parametrize("text", ["", STRICT, "activations: {bits: [8], power_of_two: true}\n"])
@pytest.mark.parametrize("make", [SmallNet, edge_model, Moved])
def test_a_uint8_file_computes_the_reference_s_integers(tmp_path: Path, text: str, make: type[nn.Module]) -> None:
    torch.manual_seed(0)
    target = write_target(tmp_path, text)
    program = converted_for(target, shake(make()), IMAGE)
    artifact = eq.lower(program, target, tmp_path / "artifact")
    assert (artifact.manifest["target"], artifact.runtime) == ("my-npu", "onnxruntime")
    parity = eq.verify(artifact, program, [IMAGE, 3 * IMAGE])
    assert parity.exact_here and parity.bit_identical == 1.0 and parity.max_error_steps == 0.0, parity
    assert replay(tmp_path / "artifact").passed


@EXACT_ARITHMETIC
def test_narrow_activations_are_clipped_in_the_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    target = write_target(tmp_path, "activations: {bits: [4]}\n")
    qconfig = eq.QConfig(eq.ActivationConfig(bits=4))
    program = eq.convert(eq.calibrate(eq.prepare(shake(SmallNet()).eval(), IMAGE, target, qconfig), [IMAGE]))
    parity = eq.verify(eq.lower(program, target, tmp_path / "artifact"), program, [5 * IMAGE])
    assert parity.bit_identical == 1.0 and parity.max_error_steps == 0.0, parity


@pytest.mark.parametrize("text", [CENTRED, "storage: int8\n", CENTRED + "weights: {power_of_two: true}\n"])
@pytest.mark.parametrize("make", [SmallNet, Moved])
def test_an_int8_file_is_the_same_program_128_lower(tmp_path: Path, text: str, make: type[nn.Module]) -> None:
    torch.manual_seed(0)
    target = write_target(tmp_path, text)
    program = converted_for(target, shake(make()), IMAGE)
    artifact = eq.lower(program, target, tmp_path / "artifact")
    model = onnx.load(artifact.path)
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    zeros = [stored[node.input[2]] for node in model.graph.node if node.op_type == "QuantizeLinear"]
    assert zeros and all(zero.dtype == "int8" for zero in zeros)
    assert "storage" not in text or not text.startswith("act") or all(int(zero) == 0 for zero in zeros)
    parity = eq.verify(artifact, program, [IMAGE, 3 * IMAGE])
    assert not parity.exact_here
    assert parity.max_error_steps <= INT8_STEPS and parity.agreement > 0.9, parity
    assert not replay(tmp_path / "artifact").exact_here


def test_a_table_over_int8_integers_has_every_entry_in_its_place(tmp_path: Path) -> None:
    torch.manual_seed(0)
    target = write_target(tmp_path, CENTRED)
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Sigmoid())
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        model[0].bias.fill_(0.0)
    x = torch.linspace(-6, 6, 1024).reshape(1, 1, 32, 32)
    program = converted_for(target, model, x)
    artifact = eq.lower(program, target, tmp_path / "artifact")
    _, found = artifact.session().run_with_taps([x])
    _, expected = eq.reference(program, x, taps=True)
    assert len(expected["0"].unique()) > 250
    table = program.consts["1"].data
    assert table is not None
    assert torch.equal(found["1"], table[found["0"].long()])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("activations: {symmetric: true}\n", "has the zero point"),
        ("activations: {power_of_two: true}\n", "has the scale .*, no power of two"),
        ("weights: {per_channel: false}\n", "the weight of conv1 has a scale for each channel"),
        ("weights: {power_of_two: true}\n", "has scales that are no powers of two"),
        ("weights: {bits: [4]}\n", "the weight of conv1 has the integers -127..127"),
        ("activations: {bits: [4, 6]}\n", "has the integers 0..255"),
        ("ops: [conv, linear]\n", "is an integer add"),
    ],
)
def test_a_program_planned_for_another_target_is_refused(tmp_path: Path, text: str, message: str) -> None:
    program = converted_for("onnxruntime", SmallNet(), IMAGE)
    with pytest.raises(PlanError, match=f"{message}.*, which my-npu does not take; plan the model for .*my-npu.yaml"):
        eq.lower(program, write_target(tmp_path, text), tmp_path / "artifact")
    assert not (tmp_path / "artifact").exists()
