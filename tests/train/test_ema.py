"""Moving averages: their closed form, what is validated and kept with them, and that training is what it was."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import edgeqat as eq
from edgeqat.errors import InputError
from edgeqat.metrics import Metric
from edgeqat.train.ema import Averages
from edgeqat.train.state import TrainingState
from models import SmallNet, shake

IMAGES = torch.randn(24, 3, 16, 16, generator=torch.Generator().manual_seed(0))
BATCHES = [(IMAGES[i : i + 8], torch.arange(8) % 10) for i in (0, 8, 16)]
EMA = eq.Ema(decay=0.75, reestimate_batches=2)

ROUNDING = 1e-6
"""What some ten float32 averages of numbers of size 1 differ by from float64."""


def make(batch_norm: str = "fold") -> eq.SimulatedModel:
    torch.manual_seed(0)
    qconfig = eq.QConfig(eq.ActivationConfig(learned=True), eq.WeightConfig(bits=4, learned=True))
    sim = eq.prepare(shake(SmallNet()).eval(), IMAGES[:2], qconfig_mapping=qconfig, batch_norm=batch_norm)
    return eq.calibrate(sim, [IMAGES])


def closed_form(values: list[Tensor], decay: float) -> Tensor:
    """Sum of each value times what the later steps keep of it, in float64; values[0] is where training began."""
    keeps = [min(decay, (1 + step) / (10 + step)) for step in range(len(values) - 1)]
    total = torch.zeros_like(values[0], dtype=torch.float64)
    for i, value in enumerate(values):
        share = 1.0 if i == 0 else 1.0 - keeps[i - 1]
        for keep in keeps[i:]:
            share *= keep
        total += share * value.double()
    return total


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.999])
def test_the_average_of_a_sequence(decay: float) -> None:
    model = nn.Linear(3, 2)
    averages = Averages(eq.Ema(decay), model)
    sequence = [model.weight.detach().clone()]
    for step in range(12):
        with torch.no_grad():
            model.weight.copy_(torch.randn(2, 3))
        averages.update(step)
        sequence.append(model.weight.detach().clone())
    found = averages.state()["weight"]
    assert torch.allclose(found.double(), closed_form(sequence, decay), rtol=0, atol=ROUNDING)
    if decay == 0.0:
        assert torch.equal(found, sequence[-1])
    assert torch.equal(averages.state()["bias"], model.bias)  # what does not change is its own average, exactly


def test_decays_begin_low_and_stay_at_the_one_asked_for() -> None:
    ema = eq.Ema(0.9)
    assert [ema.decay_at(step) for step in (0, 1, 8)] == [0.1, 2 / 11, 0.5]
    assert ema.decay_at(80) == 0.9 == ema.decay_at(10**6)


def test_training_ends_with_the_averages_learned_scales_too() -> None:
    sim = make()
    names = ["conv1.weight", "fc.bias", "quantizers.conv2/weight.scale", "quantizers.conv1.scale"]
    seen = {name: [sim.get_parameter(name).detach().clone()] for name in names}

    def look(_: float) -> None:
        for name in names:
            seen[name].append(sim.get_parameter(name).detach().clone())

    eq.fit(sim, BATCHES, epochs=3, lr=0.02, max_grad_norm=1.0, aids=eq.QatAids(ema=EMA), on_step=look)
    for name in names:
        assert not torch.equal(seen[name][0], seen[name][-1])
        expected = closed_form(seen[name], EMA.decay)
        assert torch.allclose(sim.get_parameter(name).detach().double(), expected, rtol=0, atol=ROUNDING), name


@pytest.mark.parametrize("batch_norm", ["fold", "live"])
def test_until_the_last_epoch_training_is_what_it_is_without(batch_norm: str) -> None:
    states: dict[bool, list[TrainingState]] = {False: [], True: []}
    for averaged, kept in states.items():
        aids = eq.QatAids(ema=EMA) if averaged else eq.QatAids()
        settings = {"lr": 0.02, "max_grad_norm": 1.0, "aids": aids, "on_checkpoint": kept.append}
        eq.fit(make(batch_norm), BATCHES, epochs=3, validation_batches=BATCHES, **settings)
    for one, other in zip(states[False][:2], states[True][:2], strict=True):
        assert all(torch.equal(t, other.model[name]) for name, t in one.model.items())
        assert one.history[-1].loss == other.history[-1].loss
    last, averaged_last = states[False][2], states[True][2]
    assert last.history[-1].loss == averaged_last.history[-1].loss
    assert not torch.equal(last.model["conv2.weight"], averaged_last.model["conv2.weight"])


def test_the_averages_are_validated() -> None:
    sim = make()
    validated: list[Tensor] = []

    def right(outputs: Tensor, targets: Tensor) -> Tensor:
        validated.append(outputs)
        return outputs.argmax(1) == targets

    metric = Metric("right", higher_is_better=True, is_share=True, statistics=right)
    aids = eq.QatAids(ema=EMA)
    eq.fit(sim, BATCHES, epochs=1, lr=0.02, aids=aids, validation_batches=BATCHES[:1], metric=metric, exact=None)
    with torch.no_grad():
        assert torch.equal(validated[0], sim(BATCHES[0][0]))


@pytest.mark.parametrize("schedule", [eq.BatchNormSchedule(), eq.BatchNormSchedule(reestimate_batches=1)])
def test_live_batch_norms_are_estimated_under_the_averages(schedule: eq.BatchNormSchedule) -> None:
    sim = make("live")
    eq.fit(sim, BATCHES, epochs=2, lr=0.02, aids=eq.QatAids(ema=EMA), batch_norm=schedule)
    found = {name: t.clone() for name, t in sim.named_buffers() if "running" in name}
    eq.reestimate_batch_norm(sim, [x for x, _ in BATCHES[: schedule.reestimate_batches or EMA.reestimate_batches]])
    assert all(torch.equal(t, dict(sim.named_buffers())[name]) for name, t in found.items())


def test_frozen_statistics_stay() -> None:
    sim = make("live")
    before = {name: t.clone() for name, t in sim.named_buffers() if "running" in name}
    frozen = eq.BatchNormSchedule(freeze_after=0)
    eq.fit(sim, BATCHES, epochs=2, lr=0.02, aids=eq.QatAids(ema=EMA), batch_norm=frozen)
    assert all(torch.equal(t, dict(sim.named_buffers())[name]) for name, t in before.items())


def test_biases_of_the_averages_fit_int32() -> None:
    """A channel that is all but dead has a large bias; averages have one of their own."""
    sim = make()
    with torch.no_grad():
        sim.get_parameter("conv2.bias").fill_(1e6)
    eq.fit(sim, BATCHES, epochs=1, lr=0.0, aids=eq.QatAids(ema=EMA))
    assert eq.convert(sim).ops


def test_a_float_model_has_averages_too() -> None:
    torch.manual_seed(0)
    model = shake(SmallNet())
    sequence = [model.fc.weight.detach().clone()]

    def look(_: float) -> None:
        sequence.append(model.fc.weight.detach().clone())

    eq.fit(model, BATCHES, epochs=2, lr=0.02, aids=eq.QatAids(ema=EMA), on_step=look)
    expected = closed_form(sequence, EMA.decay)
    assert torch.allclose(model.fc.weight.detach().double(), expected, rtol=0, atol=ROUNDING)


def test_refusals() -> None:
    with pytest.raises(InputError, match="found the EMA decay 1.0, wanted 0 to below 1"):
        eq.Ema(1.0)
    with pytest.raises(InputError, match="found reestimate_batches 0, wanted 1 or more"):
        eq.Ema(reestimate_batches=0)
