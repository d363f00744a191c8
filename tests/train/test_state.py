"""Training that stops after an epoch and goes on ends with the bits of training that did not."""

from __future__ import annotations

import functools
import re
from dataclasses import fields, replace

import pytest
import torch
from torch import nn

import edgeqat as eq
from edgeqat.errors import CheckpointError, ModelError
from edgeqat.train.loop import TrainingState
from edgeqat.train.state import Settings
from models import SmallNet, shake

IMAGES = torch.randn(24, 3, 16, 16, generator=torch.Generator().manual_seed(0))
BATCHES = [(IMAGES[i : i + 8], torch.arange(8) % 10) for i in (0, 8, 16)]
EPOCHS = 3


def make(quantized: bool) -> nn.Module:
    """With dropout, whose random numbers must go on too."""
    torch.manual_seed(0)
    model = shake(SmallNet())
    if not quantized:
        return model
    return eq.calibrate(eq.prepare(model.eval(), IMAGES[:2]), [IMAGES])


fit = functools.partial(
    eq.fit, train_batches=BATCHES, epochs=EPOCHS, lr=0.01, max_grad_norm=1.0, validation_batches=BATCHES
)


def train(
    model: nn.Module, optimizer: str, start: TrainingState | None = None
) -> tuple[eq.History, list[TrainingState]]:
    states: list[TrainingState] = []
    history = fit(model, optimizer=optimizer, start=start, on_checkpoint=states.append)
    return history, states


def without_seconds(history: eq.History) -> list[object]:
    return [replace(epoch, seconds=0.0) for epoch in history.epochs]


@pytest.mark.parametrize("quantized", [False, True], ids=["float", "qat"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_going_on_after_any_epoch_changes_no_bit(quantized: bool, optimizer: str) -> None:
    whole = make(quantized)
    history, states = train(whole, optimizer)
    assert [len(state.history) for state in states] == [1, 2, 3]
    for state in states:
        torch.manual_seed(99)  # whatever the process drew before
        model = make(quantized)
        again, more = train(model, optimizer, state)
        assert without_seconds(again) == without_seconds(history)
        assert len(more) == EPOCHS - len(state.history)
        for name, tensor in whole.state_dict().items():
            assert torch.equal(model.state_dict()[name], tensor), name


@pytest.mark.parametrize("quantized", [False, True], ids=["float", "qat"])
@pytest.mark.parametrize("stopped_after", [1, 2, 3, 5, 9])
def test_a_training_that_is_asked_to_stop_goes_on_after_that_very_step(quantized: bool, stopped_after: int) -> None:
    whole, steps = make(quantized), []
    history, _ = train(whole, "sgd")
    states: list[TrainingState] = []
    model = make(quantized)
    with pytest.raises(KeyboardInterrupt):
        fit(
            model,
            on_step=steps.append,
            on_checkpoint=states.append,
            should_stop=lambda: len(steps) == stopped_after,
        )
    assert len(steps) == stopped_after
    assert states[-1].underway is not None and states[-1].underway.steps == (stopped_after - 1) % 3 + 1
    model = make(quantized)
    torch.manual_seed(99)
    again, _ = train(model, "sgd", states[-1])
    assert without_seconds(again) == without_seconds(history)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_states_within_epochs_are_kept_after_so_many_seconds() -> None:
    states: list[TrainingState] = []
    fit(make(False), on_checkpoint=states.append, checkpoint_seconds=0.0)
    places = [(len(state.history), 0 if state.underway is None else state.underway.steps) for state in states]
    assert places == [(0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (1, 2), (1, 3), (2, 0), (2, 1), (2, 2), (2, 3), (3, 0)]
    states.clear()
    fit(make(False), on_checkpoint=states.append, checkpoint_seconds=1e6)
    assert [state.underway for state in states] == [None] * 3


def test_later_steps_do_not_change_a_state() -> None:
    states: list[TrainingState] = []
    copies: list[dict[str, torch.Tensor]] = []

    def keep(state: TrainingState) -> None:
        states.append(state)
        copies.append({name: tensor.clone() for name, tensor in state.model.items()})

    eq.fit(make(False), BATCHES, epochs=2, lr=0.01, on_checkpoint=keep)
    assert all(torch.equal(states[0].model[name], copies[0][name]) for name in copies[0])
    assert not torch.equal(states[0].model["conv1.weight"], states[1].model["conv1.weight"])


@pytest.mark.parametrize("name", [field.name for field in fields(Settings)])
def test_other_settings_are_refused_by_name(name: str) -> None:
    _, states = train(make(False), "sgd")
    found = getattr(states[0].settings, name)
    others = {
        "optimizer": "adamw",
        "batch_norm": eq.BatchNormSchedule(1),
        "aids": "Ema(decay=0.9)",
        "precision": "bf16-mixed",
    }
    other = others[name] if name in others else found + 1
    start = replace(states[0], settings=replace(states[0].settings, **{name: other}))
    words = re.escape(f"made with {name} {other}, this training has {found}; start afresh")
    with pytest.raises(CheckpointError, match=words):
        train(make(False), "sgd", start)


def test_a_state_of_another_model_is_refused_and_changes_nothing() -> None:
    _, states = train(make(False), "sgd")
    other = SmallNet(channels=4)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(CheckpointError, match="optimizer does not fit the model at conv1.weight"):
        train(other, "sgd", states[0])
    with pytest.raises(ModelError, match="the training state does not fit the model: conv1.weight has shape"):
        train(other, "sgd", replace(states[0], optimizer={}))
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())
