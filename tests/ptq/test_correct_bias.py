"""Bias correction, and the walk through a network that it and AdaRound take."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from networks import BATCHES, IMAGES, Chain, Normed, calibrated, uneven
from torch import Tensor, nn

import edgeqat as eq
from edgeqat.errors import DataError, PhaseError, PlanError
from edgeqat.ptq.walk import Layer, evaluating, float_twin_of, walk
from edgeqat.zoo import mobilenetv2_cifar
from models import Branches, FloatMiddle, SmallNet, shake

LARGE = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
PAIR = (IMAGES, IMAGES.flip(0))


@pytest.mark.parametrize(
    ("model", "batches"),
    [
        (SmallNet, BATCHES),
        (Chain, BATCHES),
        (FloatMiddle, BATCHES),
        (lambda: mobilenetv2_cifar(width=0.25), [LARGE[:2], LARGE[2:]]),
    ],
    ids=["small", "chain", "float middle", "mobilenetv2"],
)
def test_a_walk_computes_what_the_simulation_and_its_twin_compute(
    model: type[nn.Module], batches: list[Tensor]
) -> None:
    sim = eq.calibrate(eq.prepare(shake(model()).eval(), batches[0]), batches)
    twin = float_twin_of(sim, None)
    with evaluating(sim):
        layers = list(walk(sim, twin, batches))
        assert [layer.parameters.weight for layer in layers] == [p.weight for p in sim.parameters_of.values()]
        last = layers[-1]
        for found, target, batch in zip(last.outputs(), last.targets, batches, strict=True):
            own, wanted = sim(batch), twin(batch)
            if sim.plan.program.values[last.op.name].grid is not None:  # a quantizer comes behind it
                found = sim.quantizer_of(last.op.name)(found)
            assert torch.equal(found, own) and torch.equal(target, wanted)


def means(outputs: list[Tensor]) -> Tensor:
    return torch.cat(outputs).double().movedim(1, 0).flatten(1).mean(1)


def check_means(sim: eq.SimulatedModel, layer: Layer) -> None:
    """Each channel has the mean that it has in float; but that a bias is rounded to a whole number of steps."""
    scale = sim.weight_quantizers()[layer.parameters.weight].scale_of(sim.get_parameter(layer.parameters.weight))
    step = scale.double() * sim.quantizer_of(layer.op.inputs[0]).scale_now().double()
    found = layer.outputs()
    rounding = 1e-6 * max(float(y.abs().max()) for y in found)  # of sums in float32
    assert bool(((means(found) - means(layer.targets)).abs() <= 0.5 * step + rounding).all())


def test_every_layers_mean_is_that_in_float() -> None:
    sim = calibrated(uneven(Chain()), bits=3)
    twin, untouched = float_twin_of(sim, None), copy.deepcopy(sim)
    done = eq.correct_biases(sim, BATCHES)
    assert len(done.layers) == 5 and not done.skipped
    assert sim.phase == "quantized"
    with evaluating(sim), evaluating(untouched):
        pairs = zip(walk(sim, twin, BATCHES), walk(untouched, twin, BATCHES), strict=True)
        for layer, uncorrected in pairs:
            check_means(sim, layer)
            error, before = (float((means(x.outputs()) - means(x.targets)).abs().max()) for x in (layer, uncorrected))
            assert error < before


def test_a_shift_is_the_difference_of_the_means() -> None:
    sim = calibrated(uneven(Normed()), bits=3)
    weight, bias = (sim.get_parameter(f"conv.{name}").detach().clone() for name in ("weight", "bias"))
    with torch.no_grad():
        x = sim.activation_quantizers()["x:quantized"](IMAGES)
        on_grid, _ = sim.weight_quantizers()["conv.weight"](weight)
        shift = means([F.conv2d(IMAGES, weight)]) - means([F.conv2d(x, on_grid)])
    (layer,) = eq.correct_biases(sim, BATCHES).layers
    assert layer.rms_shift == pytest.approx(float(shift.square().mean().sqrt()), rel=1e-3)
    assert layer.largest_shift == pytest.approx(float(shift.abs().max()), rel=1e-3)
    found = sim.get_parameter("conv.bias").detach().double() - bias.double()
    assert float((found - shift).abs().max()) < 1e-3 * layer.largest_shift
    assert torch.equal(sim.get_parameter("conv.weight"), weight)


def test_behind_adaround_the_twin_from_before_it_says_what_is_wanted() -> None:
    sim = calibrated(uneven(Chain()), bits=3)
    twin, float_twin = copy.deepcopy(sim), float_twin_of(sim, None)
    eq.adaround(sim, BATCHES, eq.AdaRoundConfig(iterations=60, positions=4, learning_rate=0.05))
    eq.correct_biases(sim, BATCHES, twin)
    with evaluating(sim):
        for layer in walk(sim, float_twin, BATCHES):
            check_means(sim, layer)
    assert twin.phase == "quantized"  # it was copied, not switched


def test_what_is_left_alone_is_said() -> None:
    sim = eq.calibrate(eq.prepare(Branches().eval(), PAIR), [PAIR])
    done = eq.correct_biases(sim, [PAIR])
    assert [layer.bias for layer in done.layers] == ["head.bias"]
    assert list(done.skipped.values()) == ["2 layers have its bias"] * 2
    sim = calibrated(nn.Conv2d(3, 2, 1, bias=False).eval())
    assert list(eq.correct_biases(sim, BATCHES).skipped.values()) == ["it has no bias"]


def test_refusals() -> None:
    with pytest.raises(PhaseError, match="correct_biases wants a calibrated simulation, and it is in phase float"):
        eq.correct_biases(eq.prepare(Normed().eval(), IMAGES), BATCHES)
    live = eq.calibrate(eq.prepare(Normed().eval(), IMAGES, batch_norm="live"), BATCHES)
    with pytest.raises(PlanError, match="norm is live"):
        eq.correct_biases(live, BATCHES)
    sim = calibrated(Normed().eval())
    with pytest.raises(DataError, match="no calibration batches"):
        eq.correct_biases(sim, [])
    with pytest.raises(PlanError, match="the float twin simulates another plan"):
        eq.correct_biases(sim, BATCHES, calibrated(Chain().eval()))
