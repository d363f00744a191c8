"""Oscillating weights: counted as by hand, frozen at their integer whatever the scale does, dampened as by torch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import edgeqat as eq
from edgeqat import affine
from edgeqat.errors import InputError, PhaseError
from edgeqat.program import Grid
from edgeqat.simulate.gradients import lsq_factor
from edgeqat.simulate.parameter_quantizers import HeldIntegers, WeightQuantizer
from edgeqat.train.aids import QatAids
from edgeqat.train.oscillation import Oscillating, Track, Tracker, dampening_loss
from models import SmallNet, shake
from own_targets import is_power_of_two, write_target

IMAGES = torch.randn(32, 3, 16, 16, generator=torch.Generator().manual_seed(0))
BATCHES = [(IMAGES[i : i + 8], torch.arange(8) % 10) for i in (0, 8, 16, 24)]
ALWAYS = eq.Annealed(1e-3, 1e-3, begin=0.0)
EAGER = eq.Oscillation(momentum=0.5, freeze=ALWAYS)
"""Freezes at the first change back."""

KINDS = {
    "minmax": eq.WeightConfig(bits=4),
    "minmax, per tensor": eq.WeightConfig(bits=4, per_channel=False),
    "mse": eq.WeightConfig(bits=3, observer="mse"),
    "learned": eq.WeightConfig(bits=4, learned=True),
    "learned, 2 bits": eq.WeightConfig(bits=2, learned=True, observer="mse"),
}


def make(weight: eq.WeightConfig, batch_norm: str = "fold", target: str = "onnxruntime") -> eq.SimulatedModel:
    torch.manual_seed(0)
    model = shake(SmallNet()).eval()
    qconfig = eq.QConfig(weight=weight)
    sim = eq.prepare(model, IMAGES[:2], target, qconfig, batch_norm=batch_norm)
    return eq.calibrate(sim, [IMAGES])


# The two running means.


def test_a_sequence_by_hand() -> None:
    """Five weights over six steps; momentum 1/4, so that all is exact in float32."""
    steps = torch.tensor(
        [
            # still  to and fro  one way  waits  jumps
            [3, 0, -7, 0, 0],
            [3, 1, -6, 1, 7],
            [3, 0, -5, 1, -7],
            [3, 1, -4, 0, -7],
            [3, 0, -3, 0, 7],
            [3, 1, -2, 1, 7],
        ],
        dtype=torch.int8,
    )
    oscillated = [[0, 0, 0, 0, 0], [0, 1, 0, 0, 1], [0, 1, 0, 1, 0], [0, 1, 0, 0, 1], [0, 1, 0, 1, 0]]
    track = Track(steps[0])
    frequency, average = [0.0] * 5, steps[0].tolist()
    for now, found in zip(steps[1:], oscillated, strict=True):
        track.update(now, 0.25)
        frequency = [0.75 * f + 0.25 * o for f, o in zip(frequency, found, strict=True)]
        average = [0.75 * a + 0.25 * q for a, q in zip(average, now.tolist(), strict=True)]
        assert track.frequency.tolist() == frequency
        assert track.average.tolist() == average
        assert torch.equal(track.integers, now)
    assert track.direction.tolist() == [0, 1, 1, 1, 1]


def test_a_change_from_one_end_of_eight_bits_to_the_other() -> None:
    track = Track(torch.tensor([-127], dtype=torch.int8))
    for q in (127, -127):
        track.update(torch.tensor([q], dtype=torch.int8), 0.5)
    assert track.frequency.tolist() == [0.5] and track.direction.tolist() == [-1]


def test_a_frozen_weight_stands_at_its_average_rounded_half_to_even_and_stays() -> None:
    track = Track(torch.tensor([0, 0, 0, 0], dtype=torch.int8))
    track.frequency.copy_(torch.tensor([0.3, 0.3, 0.25, 0.3]))
    track.average.copy_(torch.tensor([1.5, 2.5, 1.0, 1.0]))
    track.freeze(0.25, torch.tensor([True, True, True, False]))
    assert track.frozen.tolist() == [True, True, False, False]
    assert track.integers.tolist() == [2, 2, 0, 0]
    track.average.fill_(5.0)
    track.freeze(0.0, torch.ones(4, dtype=torch.bool))
    assert track.integers.tolist() == [2, 2, 5, 5]


def test_an_annealed_number() -> None:
    cosine, linear = eq.Annealed(0.1, 0.02), eq.Annealed(0.0, 8.0, begin=0.5, shape="linear")
    assert cosine.at(0.24) is None and linear.at(0.49) is None
    assert [cosine.at(p) for p in (0.25, 0.625, 1.0)] == pytest.approx([0.1, 0.06, 0.02])
    assert cosine.at(0.5) == pytest.approx(0.02 + 0.08 * 0.75)  # (1 + cos 60 degrees) / 2
    assert [linear.at(p) for p in (0.5, 0.75, 1.0)] == [0.0, 4.0, 8.0]


# Freezing.


@pytest.mark.parametrize("batch_norm", ["fold", "live"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "minmax, per tensor"])
def test_frozen_integers_stay_to_the_program(kind: str, batch_norm: str) -> None:
    sim = make(KINDS[kind], batch_norm)
    _check_frozen(sim)


def test_frozen_integers_stay_with_one_scale() -> None:
    _check_frozen(make(KINDS["minmax, per tensor"]))


def test_frozen_integers_stay_on_power_of_two_scales(tmp_path: Path) -> None:
    target = write_target(tmp_path, "weights: {bits: [4], power_of_two: true}")
    sim = make(eq.WeightConfig(bits=4), target=target)
    _check_frozen(sim)
    for name, quantizer in sim.weight_quantizers().items():
        assert is_power_of_two(quantizer.scale_of(sim.get_parameter(name)))


def _check_frozen(sim: eq.SimulatedModel) -> None:
    """After every step a frozen weight has the integer that it was frozen at, and so has the program at the end."""
    held: dict[str, tuple[Tensor, Tensor]] = {}

    def look(_: float) -> None:
        for name, quantizer in sim.weight_quantizers().items():
            assert quantizer.held is not None
            weight, mask = sim.get_parameter(name), quantizer.held.mask.clone()
            now = quantizer.integers_of(weight)
            if name in held:
                before, integers = held[name]
                assert bool((mask | ~before).all())  # what is frozen stays frozen ...
                assert torch.equal(now[before], integers[before])  # ... where it is
            assert torch.equal(now[mask], quantizer.held.integers[mask])
            held[name] = mask, now
            if quantizer.follows:
                free = weight.detach().masked_fill(mask, 0.0)
                assert torch.equal(quantizer.scale_of(free), quantizer.scale_of(weight))

    aids = eq.QatAids(oscillation=EAGER)
    history = eq.fit(sim, BATCHES, epochs=6, lr=0.05, max_grad_norm=1.0, aids=aids, on_step=look, seed=1)
    assert {one.weight for one in history.oscillating} == set(held)
    assert sum(one.frozen for one in history.oscillating) > 20
    assert all(one.frozen == int(held[one.weight][0].sum()) for one in history.oscillating)
    assert all(quantizer.held is None for quantizer in sim.weight_quantizers().values())
    program = eq.convert(sim)
    for name, (mask, integers) in held.items():
        data = program.consts[name].data
        assert data is not None
        if sim.plan.batch_norm == "fold":
            assert torch.equal(data[mask], integers[mask]), name
        else:  # a negative gain of a live batch norm turns the sign of a channel
            assert torch.equal(data[mask].abs(), integers[mask].abs()), name


def test_the_largest_weight_of_a_channel_stays_free_where_the_scale_follows_it() -> None:
    sim = make(KINDS["minmax"])
    quantizer, weight = sim.weight_quantizers()["conv2.weight"], sim.get_parameter("conv2.weight")
    tracker = Tracker(eq.Oscillation(freeze=ALWAYS), sim)
    (_, _, track) = tracker._weights["conv2.weight"]
    track.frequency.fill_(1.0)
    before, scale = quantizer.integers_of(weight), quantizer.scale_of(weight).clone()
    tracker.after_step(0.5)
    assert quantizer.held is not None
    assert torch.equal(quantizer.held.mask, before.abs() < 7)
    assert torch.equal(quantizer.integers_of(weight), before)
    assert torch.equal(quantizer.scale_of(weight), scale)
    with torch.no_grad():
        weight.mul_(0.5)  # as weight decay would; all that is frozen moves back with the scale
    tracker.settle()
    assert torch.equal(quantizer.integers_of(weight), before)
    assert torch.equal(quantizer.scale_of(weight), scale * 0.5)
    track.average.fill_(6.9)  # nearest to 7, where the scale would be held from below
    track.frozen.zero_()
    tracker.after_step(0.5)
    assert not bool(track.frozen.any())


def held_quantizer(config: eq.WeightConfig) -> tuple[WeightQuantizer, Tensor]:
    """A quantizer of 4 bits whose weights are frozen at random places, and its weight."""
    random = torch.Generator().manual_seed(3)
    weight = torch.randn(6, 5, 3, 3, generator=random)
    quantizer = WeightQuantizer("w", config, Grid(-7, 7, 0), weight)
    quantizer.settle(weight)
    if config.learned:  # no weight at the very end of the grid, where it is open whether it is inside
        quantizer.scale.data.mul_(0.9)
    quantizer.mode = "quantize"
    integers = torch.randint(-7 if config.learned else -6, 8 if config.learned else 7, weight.shape, generator=random)
    mask = torch.rand(weight.shape, generator=random) < 0.5
    mask &= weight.abs() < weight.abs().amax((1, 2, 3), keepdim=True)
    quantizer.held = HeldIntegers(mask, integers.to(torch.int8))
    quantizer.settle_held(weight)
    return quantizer, weight.requires_grad_()


@pytest.mark.parametrize("kind", ["minmax", "mse", "learned"])
def test_a_held_weight_is_its_integer_times_the_scale_and_gets_no_gradient(kind: str) -> None:
    config = eq.WeightConfig(bits=4, observer="mse" if kind == "mse" else "minmax", learned=kind == "learned")
    quantizer, weight = held_quantizer(config)
    held = quantizer.held
    assert held is not None
    found, scale = quantizer(weight)
    assert scale is not None
    assert torch.equal(found[held.mask], (held.integers * affine.broadcast(scale, 0, 4))[held.mask])
    grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(4))
    found.backward(grad)
    assert weight.grad is not None
    assert bool((weight.grad[held.mask] == 0).all()) and bool((weight.grad[~held.mask] != 0).any())
    quantizer.held = None
    plain, _ = quantizer(weight.detach())
    assert torch.equal(plain, found)  # nothing but the gradient knows of it


def test_a_learned_scale_takes_the_gradient_of_integer_times_scale() -> None:
    """Against autograd in float64; a weight that is not held has q - v, or the bound outside of it."""
    quantizer, weight = held_quantizer(eq.WeightConfig(bits=4, learned=True))
    held = quantizer.held
    assert held is not None
    grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(5))
    quantizer(weight)[0].backward(grad)
    s = quantizer.scale_of(weight).double().requires_grad_()
    s4 = affine.broadcast(s, 0, 4)
    v = weight.detach().double() / s4.detach()
    own = torch.where(v.abs() < 7, v.round() - v, v.round().clamp(-7, 7))
    slope = torch.where(held.mask, held.integers.double(), own)
    expected = (grad.double() * slope).sum((1, 2, 3)) * lsq_factor(weight[0].numel(), quantizer.integers)
    found = quantizer.scale.grad
    assert found is not None
    # Float32 sums of 45 products of size 1 to 10.
    assert torch.allclose(found.double(), expected, atol=1e-5, rtol=1e-5)


def test_weights_of_more_bits_and_weights_that_are_not_trained_are_not_watched() -> None:
    sim = make(eq.WeightConfig(bits=5))
    assert eq.fit(sim, BATCHES, epochs=1, lr=0.01, aids=eq.QatAids(oscillation=EAGER)).oscillating == ()
    wider = eq.QatAids(oscillation=eq.Oscillation(max_bits=5))
    sim.get_parameter("fc.weight").requires_grad_(False)
    watched = eq.fit(sim, BATCHES, epochs=1, lr=0.01, aids=wider).oscillating
    assert [one.weight for one in watched] == ["conv1.weight", "conv2.weight", "conv3.weight"]
    assert {one.bits for one in watched} == {5}


def test_counting_alone_changes_nothing() -> None:
    counted, plain = make(KINDS["learned"]), make(KINDS["learned"])
    watching = eq.QatAids(oscillation=eq.Oscillation(momentum=0.5))
    history = eq.fit(counted, BATCHES, epochs=4, lr=0.05, max_grad_norm=1.0, aids=watching)
    eq.fit(plain, BATCHES, epochs=4, lr=0.05, max_grad_norm=1.0)
    assert all(torch.equal(t, plain.state_dict()[n]) for n, t in counted.state_dict().items())
    assert sum(one.oscillating for one in history.oscillating) > 0
    assert all(one.frozen == 0 and one.n == sim_size(counted, one) for one in history.oscillating)


def sim_size(sim: nn.Module, one: Oscillating) -> int:
    return sim.get_parameter(one.weight).numel()


def test_nothing_is_done_before_it_begins() -> None:
    sim = make(KINDS["learned"])
    tracker = Tracker(eq.Oscillation(freeze=eq.Annealed(0.0, 0.0), dampen=eq.Annealed(0.0, 1.0)), sim)
    for _, _, track in tracker._weights.values():
        track.frequency.fill_(1.0)
    tracker.after_step(0.249)
    assert tracker.loss(0.249) is None
    assert sum(one.frozen for one in tracker.counts()) == 0
    assert all(one.oscillating == one.n for one in tracker.counts())
    tracker.after_step(0.25)
    assert tracker.loss(0.25) is not None
    assert all(one.frozen == one.n and one.oscillating == 0 for one in tracker.counts())


@pytest.mark.parametrize("kind", ["minmax", "mse", "learned"])
def test_frozen_integers_stay_where_a_bias_raises_the_scale(kind: str) -> None:
    sim = make(KINDS[kind])
    quantizer, weight = sim.weight_quantizers()["conv2.weight"], sim.get_parameter("conv2.weight")
    tracker = Tracker(EAGER, sim)
    tracker._weights["conv2.weight"][2].frequency.fill_(1.0)
    tracker.after_step(0.5)
    held = quantizer.held
    assert held is not None and bool(held.mask.any())
    before, scale = held.integers.clone(), quantizer.scale_of(weight).clone()
    quantizer.min_scale.copy_(1.5 * scale)
    tracker.settle()
    assert torch.equal(quantizer.scale_of(weight), 1.5 * scale)
    assert torch.equal(quantizer.integers_of(weight)[held.mask], before[held.mask])


# Dampening.


def test_dampening_and_its_gradient_by_hand() -> None:
    """Scales are powers of two and a kernel has four weights, so that all is exact in float32."""
    weight = torch.tensor([[0.625, -0.125, 0.5, 2.0], [0.0625, 0.1875, -0.5, -0.4375]], requires_grad=True)
    quantizer = WeightQuantizer("w", eq.WeightConfig(bits=4, observer="mse"), Grid(-7, 7, 0), weight)
    quantizer.scale.copy_(torch.tensor([0.25, 0.0625]))
    # Steps: 2.5 -> 2, -0.5 -> 0, 2, 8 -> clipped to 7;  1, 3, -8 -> clipped to -7, -7.
    away = torch.tensor([[0.125, -0.125, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    loss = dampening_loss(weight, quantizer)
    loss.backward()
    assert float(loss.detach()) == float(away.square().sum()) / 4
    assert weight.grad is not None and torch.equal(weight.grad, 2 * away / 4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_of_dampening_by_autograd(kind: str) -> None:
    """The oracle is float64, with the point that each weight is on as a constant."""
    sim = make(KINDS[kind])
    quantizer, weight = sim.weight_quantizers()["conv3.weight"], sim.get_parameter("conv3.weight")
    dampening_loss(weight, quantizer).backward()
    w = weight.detach().double().requires_grad_()
    s = affine.broadcast(quantizer.scale_of(weight).double(), quantizer.axis, 4)
    bound = quantizer.qmax * s
    point = (w.detach() / s).round().clamp(-quantizer.qmax, quantizer.qmax) * s
    clipped = torch.minimum(torch.maximum(w, -bound), bound)
    (point - clipped).square().mean((1, 2, 3)).sum().backward()
    assert weight.grad is not None and w.grad is not None
    scale = quantizer.scale.grad if isinstance(getattr(quantizer, "scale", None), nn.Parameter) else None
    assert scale is None  # only the weights are pulled
    assert torch.allclose(weight.grad.double(), w.grad, rtol=1e-5, atol=1e-8)  # float32 rounding


def test_dampened_weights_end_nearer_to_their_points() -> None:
    def distance(sim: eq.SimulatedModel) -> float:
        return sum(
            float(dampening_loss(sim.get_parameter(name).detach(), quantizer))
            for name, quantizer in sim.weight_quantizers().items()
        )

    found = []
    for factor in (0.0, 1.0, 10.0):
        sim = make(KINDS["learned"])
        dampen = eq.Annealed(0.0, factor, begin=0.0, shape="linear")
        eq.fit(sim, BATCHES, epochs=6, lr=0.02, aids=eq.QatAids(oscillation=eq.Oscillation(dampen=dampen)))
        found.append(distance(sim))
    assert found[2] < found[1] < found[0]


# What cannot be.


def test_refusals() -> None:
    watching = QatAids(oscillation=EAGER)
    with pytest.raises(InputError, match="found a SmallNet whose oscillation to watch, wanted a simulation"):
        eq.fit(SmallNet(), BATCHES, epochs=1, lr=0.1, aids=watching)
    with pytest.raises(PhaseError, match="found float; calibrate first"):
        eq.fit(eq.prepare(SmallNet().eval(), IMAGES[:2]), BATCHES, epochs=1, lr=0.1, aids=watching)
    with pytest.raises(InputError, match="found begin 1.0, wanted 0 to below 1"):
        eq.Annealed(0.0, 1.0, begin=1.0)
    with pytest.raises(InputError, match="found an annealed number from -0.1 to 1.0"):
        eq.Annealed(-0.1, 1.0)
    with pytest.raises(InputError, match="found the shape 'step', wanted one of cosine, linear"):
        eq.Annealed(0.0, 1.0, shape="step")
    with pytest.raises(InputError, match="found the oscillation momentum 1.0"):
        eq.Oscillation(momentum=1.0)
    with pytest.raises(InputError, match="found max_bits 9, wanted 2 to 8"):
        eq.Oscillation(max_bits=9)


def test_what_breaks_off_leaves_an_ordinary_simulation() -> None:
    sim = make(KINDS["learned"])

    def stop(_: float) -> None:
        assert sim.weight_quantizers()["conv1.weight"].held is not None
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        eq.fit(sim, BATCHES, epochs=1, lr=0.1, aids=eq.QatAids(oscillation=EAGER), on_step=stop)
    assert all(quantizer.held is None for quantizer in sim.weight_quantizers().values())
