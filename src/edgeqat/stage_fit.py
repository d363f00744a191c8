"""The training of one stage, from its last checkpoint to its end, told of and checkpointed as it goes on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from edgeqat.errors import DataError, TrainingError
from edgeqat.factory import build_loss
from edgeqat.interrupts import asked_to_stop
from edgeqat.machine import arithmetic_here
from edgeqat.recipe import Recipe
from edgeqat.run_context import Run
from edgeqat.simulate.model import SimulatedModel
from edgeqat.target_rules import resolve_targets
from edgeqat.train.aids import NO_AIDS, QatAids
from edgeqat.train.batch_norm import ALWAYS_LIVE, BatchNormSchedule
from edgeqat.train.loop import fit
from edgeqat.train.oscillation import Oscillating
from edgeqat.train.state import History
from edgeqat.train.store import CheckpointStore
from edgeqat.training_progress import TrainingProgress

__all__ = ["fit_stage"]


def fit_stage(
    work: Run,
    store: CheckpointStore,
    stage: str,
    model: nn.Module,
    epochs: int,
    lr: float,
    max_grad_norm: float | None = None,
    batch_norm: BatchNormSchedule = ALWAYS_LIVE,
    aids: QatAids = NO_AIDS,
) -> None:
    """Trains a stage to its end, from where its last checkpoint stands; the model ends on the CPU.

    Raises:
        DataError, TrainingError: See `fit`; the message names the last good checkpoint.
        KeyboardInterrupt: The process was asked to stop; what was trained is kept.
    """
    try:
        history = _fit(work, store, stage, model, epochs, lr, max_grad_norm, batch_norm, aids)
    except (DataError, TrainingError) as error:
        kept = store.last_good(stage)
        where = "there is no checkpoint yet" if kept is None else f"the last good checkpoint is {kept}"
        told = type(error)(f"{error} (stage {stage}; {where})")
        told.told = error.told
        raise told from error
    model.cpu()
    if aids.distillation is not None:
        aids.distillation.teacher.cpu()
    if aids.oscillation is not None:
        work.monitor.line(_told_of(history.oscillating))


def _fit(
    work: Run,
    store: CheckpointStore,
    stage: str,
    model: nn.Module,
    epochs: int,
    lr: float,
    max_grad_norm: float | None,
    batch_norm: BatchNormSchedule,
    aids: QatAids,
) -> History:
    train, user_model = work.recipe.train, not isinstance(model, SimulatedModel)
    assert train is not None
    batches, start = work.training(user_model), store.latest(stage)
    done = 0 if start is None else len(start.history) * len(batches) + (start.underway.steps if start.underway else 0)
    with (
        work.monitor.steps("training", epochs * len(batches) - done) as advance,
        asked_to_stop(work.monitor.line) as should_stop,
    ):
        progress = TrainingProgress(work, stage, epochs, start, advance)
        history = fit(
            model,
            batches,
            epochs=epochs,
            lr=lr,
            optimizer=train.optimizer,
            momentum=train.momentum,
            weight_decay=train.weight_decay,
            loss=build_loss(work.recipe.task.loss),
            precision=train.precision,
            max_grad_norm=max_grad_norm,
            batch_norm=batch_norm,
            aids=aids,
            seed=train.seed,
            validation_batches=work.dealt(work.data.validation, user_model),
            metric=work.metric,
            exact=work.team.ranks.of_first(_exact(work.recipe)),
            fabric=work.team.fabric,
            accumulate=work.recipe.compute.accumulate,
            on_step=progress.step,
            on_epoch=progress.epoch,
            start=start,
            on_checkpoint=lambda state: store.save_state(stage, state),
            checkpoint_seconds=work.recipe.compute.checkpoint_seconds or None,
            should_stop=should_stop,
        )
        # Asked after the last step: its epoch is kept, and a resumed run goes on with the next stage.
        if int(work.team.ranks.largest(torch.tensor(int(should_stop())))):
            raise KeyboardInterrupt
    return history


def _exact(recipe: Recipe) -> str | None:
    """The arithmetic that validation computes in: of what will be shipped; where it is not known, the simulation's."""
    target = resolve_targets(recipe.export)[0]
    return arithmetic_here(target.name if target.file is None else target.runtime)


def _told_of(found: Sequence[Oscillating]) -> str:
    """How many weights oscillate, and in which layer most of them."""
    n = sum(one.n for one in found)
    if n == 0:
        return "oscillating weights: none has few enough bits to be watched"
    oscillating, frozen = sum(one.oscillating for one in found), sum(one.frozen for one in found)
    worst = max(found, key=lambda one: (one.oscillating + one.frozen) / one.n)
    share = (worst.oscillating + worst.frozen) / worst.n
    whole = f"oscillating weights: {oscillating} of {n} ({oscillating / n:.2%}), {frozen} more frozen"
    return f"{whole}; most in {worst.weight}: {share:.2%} of its {worst.n}"
