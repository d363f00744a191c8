"""Weights whose scale calibration finds and that stays, or that training moves; biases on int32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import edgeqat as eq
from edgeqat import affine
from edgeqat.errors import PhaseError
from edgeqat.simulate.weight_scales import weight_scale
from helpers import EXACT_ARITHMETIC
from models import SmallNet, shake

IMAGE = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
TARGETS = torch.arange(8) % 10


def make(observer: str, bits: int = 4, learned: bool = False) -> eq.SimulatedModel:
    torch.manual_seed(0)
    weight = eq.WeightConfig(bits=bits, observer=observer, learned=learned)
    return eq.prepare(shake(SmallNet()).eval(), IMAGE, qconfig_mapping=eq.QConfig(weight=weight))


@pytest.mark.parametrize("learned", [False, True], ids=["frozen", "learned"])
@pytest.mark.parametrize("observer", ["mse", "percentile"])
def test_calibration_finds_the_scale_of_the_observer(observer: str, learned: bool) -> None:
    sim = make(observer, learned=learned)
    assert not any(quantizer.calibrated for quantizer in sim.weight_quantizers().values())
    with pytest.raises(PhaseError, match="has no grid yet"):
        sim.set_phase("quantized")
    eq.calibrate(sim, [IMAGE])
    for name, quantizer in sim.weight_quantizers().items():
        weight = sim.get_parameter(name).detach()
        expected = weight_scale(weight, observer, quantizer.qmax, quantizer.axis)
        assert torch.equal(quantizer.scale_of(weight), expected)


@EXACT_ARITHMETIC
@pytest.mark.parametrize("observer", ["mse", "percentile"])
def test_a_frozen_scale_stays_while_weights_move_and_is_what_runs(tmp_path: Path, observer: str) -> None:
    sim = eq.calibrate(make(observer), [IMAGE])
    before = {name: q.scale.clone() for name, q in sim.weight_quantizers().items()}
    eq.fit(sim, [(IMAGE, TARGETS)] * 3, epochs=2, lr=0.02)
    assert all(torch.equal(q.scale, before[name]) for name, q in sim.weight_quantizers().items())
    program = eq.convert(sim)
    assert int(max(const.data.abs().max() for const in program.consts.values() if const.data is not None)) <= 7
    assert eq.verify(eq.lower(program, "onnxruntime", tmp_path / "a"), program, [IMAGE]).bit_identical == 1.0


def test_by_default_the_scale_follows_the_weight() -> None:
    sim = eq.calibrate(make("minmax", bits=8), [IMAGE])
    weight = sim.get_parameter("conv2.weight")
    quantizer = sim.weight_quantizers()["conv2.weight"]
    with torch.no_grad():
        weight.mul_(3.0)
    assert torch.equal(quantizer.scale_of(weight), affine.symmetric_scale(weight, 127, 0))


def test_a_clipped_weight_gets_no_gradient() -> None:
    sim = eq.calibrate(make("mse"), [IMAGE])
    quantizer, weight = sim.weight_quantizers()["conv2.weight"], sim.get_parameter("conv2.weight")
    with torch.no_grad():
        weight[0, 0, 0, 0] = 100.0
    quantizer(weight)[0].sum().backward()
    assert weight.grad is not None
    assert float(weight.grad[0, 0, 0, 0]) == 0.0 and float(weight.grad[0, 0, 1, 1]) == 1.0
