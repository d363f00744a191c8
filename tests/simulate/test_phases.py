"""Phases as one state: every legal move, every illegal one with the way out."""

from __future__ import annotations

import copy

import pytest
import torch

import edgeqat as eq
from edgeqat.errors import PhaseError
from edgeqat.simulate.phases import PHASES, check_move
from models import SmallNet, shake

IMAGE = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))

REFUSED = {
    ("converted", "calibrating"): "prepare the model again, or reopen this simulation",
    ("converted", "float"): r"reopen it with set_phase\('quantized'\) first",
    ("calibrating", "converted"): "finish before convert",
    ("float", "converted"): r"set_phase\('quantized'\) before convert",
}


@pytest.mark.parametrize("wanted", PHASES)
@pytest.mark.parametrize("current", PHASES)
def test_every_move(current: str, wanted: str) -> None:
    if (current, wanted) not in REFUSED:
        check_move(current, wanted)
        return
    with pytest.raises(PhaseError, match=REFUSED[current, wanted]):
        check_move(current, wanted)


def test_convert_closes_calibration_and_leaves_the_simulation_running() -> None:
    sim = eq.calibrate(eq.prepare(shake(SmallNet()).eval(), IMAGE), [IMAGE])
    with torch.no_grad():
        expected = sim(IMAGE)
        program = eq.convert(sim)
        assert sim.phase == "converted" and len(program.grid_hash) == 64
        assert torch.equal(sim(IMAGE), expected)
    training = sim.training
    with pytest.raises(PhaseError, match="cannot go from converted to calibrating"):
        eq.calibrate(sim, [2 * IMAGE])
    assert sim.phase == "converted" and sim.training == training
    assert eq.convert(sim).grid_hash == program.grid_hash  # nothing moved
    sim.set_phase("quantized")
    assert eq.convert(eq.calibrate(sim, [2 * IMAGE])).grid_hash != program.grid_hash


def test_training_reopens_what_was_converted() -> None:
    sim = eq.calibrate(eq.prepare(shake(SmallNet()).eval(), IMAGE), [IMAGE])
    eq.convert(sim)
    eq.fit(sim, [(IMAGE, torch.arange(4))], epochs=1, lr=0.01)
    assert sim.phase == "quantized"


def test_exact_mode_is_no_conversion() -> None:
    sim = eq.calibrate(eq.prepare(shake(SmallNet()).eval(), IMAGE), [IMAGE])
    with sim.exact("onnxruntime/x86"):
        assert sim.phase == "quantized"


def test_a_converting_move_from_float_says_what_to_do() -> None:
    sim = eq.calibrate(eq.prepare(shake(SmallNet()).eval(), IMAGE), [IMAGE])
    sim.set_phase("float")
    with pytest.raises(PhaseError, match="switch quantization on"):
        eq.convert(sim)


def test_the_grid_hash_is_of_grids_alone_and_of_every_bit() -> None:
    sim = eq.calibrate(eq.prepare(shake(SmallNet()).eval(), IMAGE), [IMAGE])
    first = eq.convert(sim).grid_hash
    other = copy.deepcopy(sim)
    other.get_parameter("fc.bias").data.add_(1.0)
    assert eq.convert(other).grid_hash == first
    quantizer = next(iter(other.activation_quantizers().values()))
    scale, zero_point = quantizer.grid()
    quantizer.set_grid(torch.nextafter(scale, torch.tensor(1.0)), zero_point)
    assert eq.convert(other).grid_hash != first
