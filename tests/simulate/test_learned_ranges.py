"""Learned ranges in a whole simulation: they start from calibration, stay where the targets can follow, and ship."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import edgeqat as eq
from edgeqat.simulate.fake_quant import FREEDOM, ActivationQuantizer
from helpers import EXACT_ARITHMETIC
from models import SmallNet, shake

IMAGE = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
TARGETS = torch.arange(8) % 10
LEARNED = eq.QConfig(eq.ActivationConfig(learned=True), eq.WeightConfig(learned=True))


def calibrated(qconfig: eq.QConfig = LEARNED, target: str = "onnxruntime") -> eq.SimulatedModel:
    torch.manual_seed(0)
    sim = eq.prepare(shake(SmallNet()).eval(), IMAGE, target, qconfig)
    return eq.calibrate(sim, [IMAGE])


def test_before_training_they_are_the_calibrated_ones() -> None:
    learned, frozen = calibrated(), calibrated(eq.QConfig())
    with torch.no_grad():
        assert torch.equal(learned(IMAGE), frozen(IMAGE))
    assert eq.convert(learned).grid_hash == eq.convert(frozen).grid_hash
    assert (learned.ranges, frozen.ranges) == ("learned", "frozen")


def test_training_moves_every_range_that_data_reaches() -> None:
    sim = calibrated()
    before = {name: p.detach().clone() for name, p in sim.quantizers.named_parameters()}
    assert {name.rpartition(".")[2] for name in before} == {"scale", "offset"}
    eq.fit(sim, [(IMAGE, TARGETS)] * 4, epochs=2, lr=0.002)
    unmoved = [n for n, p in sim.quantizers.named_parameters() if torch.equal(p.detach(), before[n])]
    assert not [name for name in unmoved if name.endswith("scale")]


@EXACT_ARITHMETIC
@pytest.mark.parametrize("target", ["onnxruntime", "torchscript"])
def test_what_was_learned_is_what_runs(tmp_path: Path, target: str) -> None:
    sim = calibrated(target=target)
    eq.fit(sim, [(IMAGE, TARGETS)] * 4, epochs=2, lr=0.002, exact=target)
    program = eq.convert(sim)
    artifact = eq.lower(program, target, tmp_path / "a")
    found = eq.verify(artifact, program, [IMAGE])
    assert found.bit_identical == 1.0 and found.max_error_steps == 0.0
    assert artifact.manifest["grid_hash"] == program.grid_hash
    for name, quantizer in sim.activation_quantizers().items():
        assert torch.equal(program.grid_of(name).filled()[0], quantizer.scale_now())


def test_a_relu6_never_reaches_beyond_six() -> None:
    sim = calibrated()
    name = next(n for n, q in sim.activation_quantizers().items() if q.activation == "relu6")
    quantizer = sim.quantizer_of(name)
    quantizer.set_grid(torch.tensor(5.0 / 255), torch.tensor(0))
    with torch.no_grad():
        quantizer.scale.fill_(1.0)
        top = float(quantizer(torch.tensor([100.0])))
    assert top == pytest.approx(6.0, rel=1e-6)
    assert float(quantizer.scale_now()) == pytest.approx(6.0 / 255, rel=1e-6)


@pytest.mark.parametrize("wild", [-1.0, 100.0], ids=["below zero", "far above"])
def test_a_range_that_training_drove_away_stays_near_the_calibrated_one(tmp_path: Path, wild: float) -> None:
    sim = calibrated()
    quantizers = [*sim.activation_quantizers().values(), *sim.weight_quantizers().values()]
    expected = [quantizer.scale.detach() * (FREEDOM if wild > 0 else 1 / FREEDOM) for quantizer in quantizers]
    for quantizer in quantizers:
        quantizer.scale.data.fill_(wild)
    for quantizer, scale in zip(quantizers, expected, strict=True):
        found = quantizer.scale_now() if isinstance(quantizer, ActivationQuantizer) else quantizer.scale_of(scale)
        top = torch.tensor(6.0 / 255 if getattr(quantizer, "activation", None) == "relu6" else torch.inf)
        assert torch.allclose(found, torch.minimum(scale, top))
    program = eq.convert(sim)
    assert eq.verify(eq.lower(program, "onnxruntime", tmp_path / "a"), program, [IMAGE]).bit_identical == 1.0


def test_ranges_can_be_frozen_and_thawed() -> None:
    sim = calibrated()
    sim.freeze_ranges()
    assert sim.ranges == "frozen"
    before = {name: p.detach().clone() for name, p in sim.quantizers.named_parameters()}
    eq.fit(sim, [(IMAGE, TARGETS)], epochs=1, lr=0.01)
    assert all(torch.equal(p.detach(), before[n]) for n, p in sim.quantizers.named_parameters())
    sim.freeze_ranges(False)
    assert sim.ranges == "learned"


class SharedByPool(nn.Module):
    """In TorchScript the pool's output is on its input's grid, which then has two readers of its gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.conv(x)).mean((2, 3)))


@EXACT_ARITHMETIC
def test_a_shared_grid_is_learned_from_all_that_is_on_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sim = eq.prepare(SharedByPool().eval(), IMAGE, "torchscript", LEARNED)
    eq.fit(eq.calibrate(sim, [IMAGE]), [(IMAGE, TARGETS)] * 3, epochs=2, lr=0.01, exact="torchscript")
    program = eq.convert(sim)
    assert eq.verify(eq.lower(program, "torchscript", tmp_path / "a"), program, [IMAGE]).bit_identical == 1.0


def test_printing_says_what_is_learned() -> None:
    assert "learned, observer=histogram" in repr(calibrated())
