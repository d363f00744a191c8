"""Training with aids that stops after an epoch and goes on ends with the bits of training that did not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import edgeqat as eq
from edgeqat.errors import CheckpointError
from edgeqat.train.aids import NO_AIDS
from edgeqat.train.state import TrainingState
from edgeqat.train.store import CheckpointStore, RunIdentity
from models import SmallNet, shake

IMAGES = torch.randn(24, 3, 16, 16, generator=torch.Generator().manual_seed(0))
BATCHES = [(IMAGES[i : i + 8], torch.arange(8) % 10) for i in (0, 8, 16)]
EPOCHS = 4
FREEZE, DAMPEN = eq.Annealed(0.1, 0.01, begin=0.3), eq.Annealed(0.0, 1.0, begin=0.3)
FREEZING = eq.Oscillation(momentum=0.3, freeze=FREEZE)


def teacher() -> eq.Distillation:
    torch.manual_seed(7)
    return eq.Distillation(shake(SmallNet(), seed=5), weight=0.5, temperature=2.0)


AIDS = {
    "distillation": eq.QatAids(distillation=teacher()),
    "freezing": eq.QatAids(oscillation=FREEZING),
    "dampening": eq.QatAids(oscillation=eq.Oscillation(momentum=0.3, dampen=DAMPEN)),
    "ema": eq.QatAids(ema=eq.Ema(decay=0.8, reestimate_batches=2)),
    "all": eq.QatAids(teacher(), replace(FREEZING, dampen=DAMPEN), eq.Ema(decay=0.8, reestimate_batches=2)),
}


def make(kind: str) -> eq.SimulatedModel:
    """Weights of 4 bits, with dropout, whose random numbers must go on too."""
    torch.manual_seed(0)
    weight = eq.WeightConfig(bits=4, learned=kind == "learned")
    qconfig = eq.QConfig(eq.ActivationConfig(learned=kind == "learned"), weight)
    batch_norm = "live" if kind == "live" else "fold"
    sim = eq.prepare(shake(SmallNet()).eval(), IMAGES[:2], qconfig_mapping=qconfig, batch_norm=batch_norm)
    return eq.calibrate(sim, [IMAGES])


def train(
    sim: eq.SimulatedModel, aids: eq.QatAids, start: TrainingState | None = None
) -> tuple[eq.History, list[TrainingState]]:
    states: list[TrainingState] = []
    history = eq.fit(
        sim,
        BATCHES,
        epochs=EPOCHS,
        lr=0.05,
        max_grad_norm=1.0,
        aids=aids,
        validation_batches=BATCHES,
        start=start,
        on_checkpoint=states.append,
        checkpoint_seconds=0.0,
    )
    return history, states


def stored(state: TrainingState, folder: Path) -> TrainingState:
    """What a checkpoint on disk gives back."""
    identity = RunIdentity({}, "r" * 64, "p" * 64, "d" * 64)
    store = CheckpointStore(folder, identity, True, lambda _: None)
    store.save_state("qat", state)
    found = store.latest("qat")
    assert found is not None
    return found


@pytest.mark.parametrize("kind", ["minmax", "learned", "live"])
@pytest.mark.parametrize("name", AIDS)
def test_going_on_after_an_epoch_and_within_one_changes_no_bit(tmp_path: Path, name: str, kind: str) -> None:
    whole = make(kind)
    history, states = train(whole, AIDS[name])
    if AIDS[name].oscillation is not None and AIDS[name].oscillation.freeze is not None:
        assert sum(one.frozen for one in history.oscillating) > 0
    ends, within = [s for s in states if s.underway is None], states[len(BATCHES) + 2]
    for state in [*ends, within] if kind == "learned" else (ends[1], within):
        torch.manual_seed(99)  # whatever the process drew before
        sim = make(kind)
        again, more = train(sim, AIDS[name], stored(state, tmp_path / str(states.index(state))))
        assert [replace(e, seconds=0.0) for e in again.epochs] == [replace(e, seconds=0.0) for e in history.epochs]
        assert again.oscillating == history.oscillating
        assert len(more) == len(states) - 1 - states.index(state)
        for key, tensor in whole.state_dict().items():
            assert torch.equal(sim.state_dict()[key], tensor), key
        if more:
            assert same(more[-1].aids, states[-1].aids)


def same(one: object, other: object) -> bool:
    assert isinstance(one, dict) and isinstance(other, dict)
    return one.keys() == other.keys() and all(torch.equal(t, other[name]) for name, t in one.items())


def test_later_steps_do_not_change_a_state() -> None:
    copies: list[dict[str, Tensor]] = []
    states: list[TrainingState] = []

    def keep(state: TrainingState) -> None:
        states.append(state)
        copies.append({name: t.clone() for name, t in state.aids.items()})

    eq.fit(make("minmax"), BATCHES, epochs=2, lr=0.05, aids=AIDS["all"], on_checkpoint=keep)
    assert copies[0] and same(dict(states[0].aids), copies[0])
    assert not same(states[0].aids, dict(states[1].aids))


def test_other_aids_or_another_model_s_are_refused() -> None:
    _, states = train(make("minmax"), AIDS["ema"])
    found = r"made with aids Ema\(decay=0.8, reestimate_batches=2\), this training has none; start afresh"
    with pytest.raises(CheckpointError, match=found):
        train(make("minmax"), NO_AIDS, states[0])
    with pytest.raises(CheckpointError, match="moving averages do not fit the model"):
        train(make("minmax"), AIDS["ema"], replace(states[0], aids={}))
    with pytest.raises(CheckpointError, match="holds magic/x, which is of no aid known here"):
        train(make("minmax"), AIDS["ema"], replace(states[0], aids={"magic/x": torch.zeros(1)}))
    _, states = train(make("minmax"), AIDS["freezing"])
    with pytest.raises(CheckpointError, match="oscillating weights do not fit the model"):
        train(make("minmax"), AIDS["freezing"], replace(states[0], aids={}))


def test_settings_are_described_in_full() -> None:
    told = AIDS["all"].describe()
    assert "weight=0.5, temperature=2.0" in told and "decay=0.8" in told and "begin=0.3" in told
    assert told == eq.QatAids(teacher(), AIDS["all"].oscillation, AIDS["all"].ema).describe()
    assert NO_AIDS.describe() == "none"
