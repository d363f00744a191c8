"""Plans and grids for targets of one's own: symmetric, per-tensor, power-of-two, and which ops there are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import edgeqat as eq
from edgeqat import affine
from edgeqat.errors import PlanError
from edgeqat.program import Kind
from models import SmallNet, shake
from own_targets import converted_for, is_power_of_two, write_target

IMAGE = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
STRICT = "activations: {symmetric: true, power_of_two: true}\nweights: {per_channel: false, power_of_two: true}\n"
POSITIVE = st.floats(2.0**-30, 2.0**30, width=32)


@given(scale=POSITIVE)
def test_the_power_of_two_above_is_the_smallest_that_is_not_below(scale: float) -> None:
    given_scale = torch.tensor(scale)
    found = affine.power_of_two_above(given_scale)
    assert is_power_of_two(found) and found.dtype == torch.float32
    assert found >= given_scale > found / 2


@given(low=st.floats(-1e6, 1e6), high=st.floats(-1e6, 1e6), bits=st.integers(2, 8), symmetric=st.booleans())
def test_a_power_of_two_grid_covers_its_range(low: float, high: float, bits: int, symmetric: bool) -> None:
    top = 2**bits - 1
    scale, zero_point = affine.activation_qparams(low, high, 0, top, symmetric=symmetric, power_of_two=True)
    assert is_power_of_two(scale)
    assert not symmetric or int(zero_point) == 2 ** (bits - 1)
    # Rounding the zero point, and the missing upper step of a symmetric grid, each cost half a step at an end.
    assert float(scale) * (0 - int(zero_point) - 1) <= min(low, 0.0)
    assert float(scale) * (top - int(zero_point) + 1) >= max(high, 0.0)


@settings(max_examples=8, deadline=None)
@given(factor=st.floats(0.05, 20.0), symmetric=st.booleans(), per_channel=st.booleans())
def test_every_scale_is_a_power_of_two(
    tmp_path_factory: pytest.TempPathFactory, factor: float, symmetric: bool, per_channel: bool
) -> None:
    text = f"activations: {{symmetric: {symmetric}, power_of_two: true}}\n".lower()
    text += f"weights: {{per_channel: {per_channel}, power_of_two: true}}\n".lower()
    target = write_target(tmp_path_factory.mktemp("target"), text)
    program = converted_for(target, SmallNet(), IMAGE, factor)
    grids = [value.grid for value in program.values.values() if value.grid is not None]
    assert grids and all(is_power_of_two(grid.filled()[0]) for grid in grids)
    assert all(is_power_of_two(const.grid.filled()[0]) for const in program.consts.values())
    for const in program.consts.values():
        assert (const.grid.axis is None) is not per_channel
    if symmetric:
        rectified = {"conv1", "add", "add_1"}
        for op in program.ops:
            if program.values[op.name].grid is not None and op.kind in (Kind.CONV, Kind.ADD, Kind.QUANTIZE):
                assert program.grid_of(op.name).per_tensor()[1] == (0 if op.name in rectified else 128)


def test_the_plan_says_what_it_changed(tmp_path: Path) -> None:
    rows = {row.op: row for row in eq.plan(SmallNet(), IMAGE, target=write_target(tmp_path, STRICT)).rows()}
    assert rows["conv1"].grid_weight == "s8"  # not per-channel, which is the default
    assert rows["conv1"].reason.endswith(
        "symmetric histogram range; my-npu takes symmetric activations, power-of-two scales, one scale per weight, "
        "power-of-two scales of weights"
    )
    assert rows["add"].reason.endswith("; my-npu takes symmetric activations, power-of-two scales")
    plain = eq.plan(SmallNet(), IMAGE, target=write_target(tmp_path))
    assert "takes" not in str(plain)


def test_several_targets_are_satisfied_at_once(tmp_path: Path) -> None:
    planned = eq.plan(SmallNet(), IMAGE, target=["onnxruntime", write_target(tmp_path, STRICT)])
    assert planned.targets == ("onnxruntime", "my-npu")
    assert all(config.symmetric for config in planned.activations.values())
    assert not any(config.per_channel for config in planned.weights.values())


def test_what_it_has_no_op_for_stays_in_float(tmp_path: Path) -> None:
    planned = eq.plan(SmallNet(), IMAGE, target=write_target(tmp_path, "ops: [conv, linear, view]"))
    reasons = {row.kind: row.reason for row in planned.rows() if row.runs == "float"}
    assert reasons["add.Tensor"] == "my-npu has no integer add"
    kinds = {op.kind for op in planned.program.ops}
    assert kinds == {Kind.QUANTIZE, Kind.CONV, Kind.LINEAR, Kind.DEQUANTIZE, Kind.FLOAT}


def test_a_relu6_ends_at_6_whatever_the_scale(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU6())
    x = 20 * IMAGE
    sim = eq.prepare(model.eval(), x, target=write_target(tmp_path, STRICT))
    for factor in (1.0, 0.03, 0.02, 0.015):  # each calibration begins with the whole grid, as a first one does
        eq.calibrate(sim, [x])
        assert sim.activation_quantizers()["0"].highest == 192
        eq.calibrate(sim, [factor * x])
        first = eq.prepare(model.eval(), x, target=write_target(tmp_path, STRICT))
        eq.calibrate(first, [factor * x])
        again, once = (s.activation_quantizers()["0"] for s in (sim, first))
        assert again.grid() == once.grid() and again.highest == once.highest == (192 if factor == 1.0 else 255)
    eq.calibrate(sim, [x])
    program = eq.convert(sim)
    grid = program.grid_of("0")
    assert (float(grid.filled()[0]), grid.qmax) == (1 / 32, 192)
    assert float(sim(x).detach().max()) == float(eq.reference(program, x).max()) == 6.0
    other = eq.prepare(model, x, target=write_target(tmp_path, STRICT))
    other.load_state_dict(sim.state_dict())
    assert other.activation_quantizers()["0"].highest == 192


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ReLU6()])
@pytest.mark.parametrize("learned", [False, True])
def test_a_centred_relu_is_a_clamp_of_its_own(tmp_path: Path, activation: nn.Module, learned: bool) -> None:
    target = write_target(tmp_path, "activations: {symmetric: true}\nstorage: int8\n")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), activation, nn.Conv2d(4, 2, 1))
    qconfig = eq.QConfig(eq.ActivationConfig(learned=learned))
    x = 3 * IMAGE
    sim = eq.calibrate(eq.prepare(shake(model).eval(), x, target=target, qconfig_mapping=qconfig), [x])
    assert [op.kind.value for op in sim.plan.program.ops] == ["quantize", "conv", "clamp", "conv", "dequantize"]
    sim.train()
    eq.fit(sim, [(x, torch.zeros(4, 2, 16, 16))], epochs=2, lr=1e-3, loss=nn.functional.mse_loss)
    program = eq.convert(sim)
    assert {program.grid_of(n).per_tensor()[1] for n in program.tapped()} == {128}
    outputs, taps = eq.reference(program, x, taps=True)
    assert int(taps["0:unclamped"].min()) < 128 == int(taps["0"].min())
    # The simulation sums in float32: a value next to a tie may land a step away, seldom.
    step = program.grid_of("3").per_tensor()[0]
    simulated = sim.eval()(x).detach()
    assert float((simulated - outputs).abs().max()) <= step * 1.001
    assert float((simulated == outputs).double().mean()) > 0.99


def test_without_an_integer_clamp_a_centred_relu_stays_in_float(tmp_path: Path) -> None:
    text = "activations: {symmetric: true}\nstorage: int8\nops: [conv]\n"
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
    planned = eq.plan(model, IMAGE, target=write_target(tmp_path, text))
    reasons = [row.reason for row in planned.rows() if row.runs == "float"]
    assert any(reason.startswith("my-npu has no integer clamp") for reason in reasons)


@pytest.mark.parametrize(("function", "zero_point"), [(nn.Sigmoid(), 128), (nn.Hardsigmoid(), 128), (nn.Tanh(), 128)])
def test_a_known_range_is_symmetric_too(tmp_path: Path, function: nn.Module, zero_point: int) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), function)
    program = converted_for(write_target(tmp_path, STRICT), model, IMAGE)
    assert program.grid_of("1").per_tensor() == (1 / 128, zero_point)


@pytest.mark.parametrize(
    ("qconfig", "arguments", "message"),
    [
        (eq.QConfig(eq.ActivationConfig(learned=True)), {}, "learned scales of activations, but my-npu"),
        (eq.QConfig(weight=eq.WeightConfig(learned=True)), {}, "learned scales of weights, but my-npu"),
        (eq.QConfig(weight=eq.WeightConfig(bits=4)), {}, "4-bit weights, but my-npu takes 8 bits"),
        (None, {"batch_norm": "live"}, "use batch_norm: fold"),
    ],
)
def test_what_cannot_follow_is_refused(
    tmp_path: Path, qconfig: eq.QConfig | None, arguments: dict[str, str], message: str
) -> None:
    text = "activations: {power_of_two: true}\nweights: {bits: [8], power_of_two: true}\n"
    with pytest.raises(PlanError, match=message):
        eq.plan(SmallNet(), IMAGE, write_target(tmp_path, text), qconfig, **arguments)  # type: ignore[arg-type]


def test_a_relu6_that_ends_within_the_grid_is_refused_for_torch_s_kernels(tmp_path: Path) -> None:
    text = "activations: {power_of_two: true}\n"
    with pytest.raises(PlanError, match="torchscript cannot clamp there"):
        eq.plan(SmallNet(), IMAGE, [write_target(tmp_path, text), "torchscript"])


@pytest.mark.parametrize("observer", ["minmax", "mse", "percentile"])
def test_weights_of_every_observer_get_powers_of_two(tmp_path: Path, observer: str) -> None:
    qconfig = eq.QConfig(weight=eq.WeightConfig(observer=observer))
    target = write_target(tmp_path, "weights: {power_of_two: true}\n")
    sim = eq.calibrate(eq.prepare(SmallNet().eval(), IMAGE, target, qconfig), [IMAGE])
    for const in eq.convert(sim).consts.values():
        assert const.grid.axis == 0 and is_power_of_two(const.grid.filled()[0])
