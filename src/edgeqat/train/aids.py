"""Aids for quantization-aware training at few bits: which `fit` is to use, and the ones it uses at work."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from edgeqat.errors import CheckpointError, InputError
from edgeqat.signature import Batch
from edgeqat.simulate.model import SimulatedModel
from edgeqat.train.batch_norm import BatchNormSchedule
from edgeqat.train.distillation import Distillation
from edgeqat.train.ema import Averages, Ema
from edgeqat.train.oscillation import Oscillating, Oscillation, Tracker

__all__ = ["NO_AIDS", "AidsAtWork", "QatAids", "at_work"]


@dataclass(frozen=True)
class QatAids:
    """What helps training at few bits, or may; None is without.

    Attributes:
        distillation: A float teacher's class scores are learned too.
        oscillation: Weights that oscillate between two integers are counted, and frozen or dampened.
        ema: Training ends with moving averages of the parameters.
    """

    distillation: Distillation | None = None
    oscillation: Oscillation | None = None
    ema: Ema | None = None

    def describe(self) -> str:
        """All settings as one line: what training must agree with to be gone on from."""
        told = [self.distillation.describe()] if self.distillation is not None else []
        told += [repr(aid) for aid in (self.oscillation, self.ema) if aid is not None]
        return ", ".join(told) or "none"


NO_AIDS = QatAids()
"""Nothing but the loss."""


class AidsAtWork:
    """The aids of one training; steps are counted from 0 over all epochs, `steps` are there in all."""

    def __init__(self, aids: QatAids, model: nn.Module, steps: int) -> None:
        self._aids, self._model, self._steps = aids, model, steps
        self._averages = None if aids.ema is None else Averages(aids.ema, model)
        self._tracker = None if aids.oscillation is None else Tracker(aids.oscillation, model)

    def loss(self, task: Tensor, inputs: Batch, outputs: Any, targets: Any, step: int) -> Tensor:
        """The loss to minimise, 0-d, from the task's."""
        distillation = self._aids.distillation
        total = task if distillation is None else distillation.loss(task, inputs, outputs, targets)
        dampening = None if self._tracker is None else self._tracker.loss(step / self._steps)
        return total if dampening is None else total + dampening

    def after_step(self, step: int) -> None:
        """Looks at the parameters that a step has moved."""
        if self._tracker is not None:
            self._tracker.after_step(step / self._steps)
        if self._averages is not None:
            self._averages.update(step)

    def settle(self) -> None:
        """Ends an epoch, in which learned ranges and biases have moved: biases fit int32, frozen integers stay."""
        if isinstance(self._model, SimulatedModel):
            self._model.reserve_bias_ranges()
        if self._tracker is not None:
            self._tracker.settle()

    @contextmanager
    def evaluated(self, keep: bool) -> Iterator[None]:
        """Within it the model is what is evaluated: with moving averages, if there are; `keep` keeps them."""
        averaged: AbstractContextManager[None] = nullcontext()
        if self._averages is not None:
            averaged = self._averages.in_place(keep)
        with averaged:
            if self._averages is not None:
                self.settle()
            yield

    def batches_to_reestimate(self, schedule: BatchNormSchedule, epoch: int) -> int:
        """Over how many batches batch norms are estimated afresh after an epoch, counted from 0; 0 for not."""
        if schedule.frozen(epoch):
            return 0
        if schedule.reestimate_batches > 0 or self._aids.ema is None:
            return schedule.reestimate_batches
        return self._aids.ema.reestimate_batches

    def counts(self) -> tuple[Oscillating, ...]:
        """How many weights oscillate, by parameter; empty where that is not watched."""
        return () if self._tracker is None else self._tracker.counts()

    def state(self) -> dict[str, Tensor]:
        """All that the next step depends on: copies on the CPU."""
        found = {} if self._averages is None else _prefixed("ema", self._averages.state())
        found |= {} if self._tracker is None else _prefixed("oscillation", self._tracker.state())
        return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in found.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Goes on from what `state` gave.

        Raises:
            CheckpointError: It is not of these aids and this model.
        """
        parts: dict[str, dict[str, Tensor]] = {"ema": {}, "oscillation": {}}
        for name, tensor in state.items():
            aid, _, rest = name.partition("/")
            if aid not in parts:
                raise CheckpointError(f"the training state holds {name}, which is of no aid known here; start afresh")
            parts[aid][rest] = tensor
        if self._averages is not None:
            self._averages.restore(parts["ema"])
        if self._tracker is not None:
            self._tracker.restore(parts["oscillation"])

    def release(self) -> None:
        """Leaves the model an ordinary one."""
        if self._tracker is not None:
            self._tracker.release()


@contextmanager
def at_work(aids: QatAids, model: nn.Module, steps: int) -> Iterator[AidsAtWork]:
    """The aids of one training, which leave an ordinary model behind, however it ends.

    Raises:
        InputError: The teacher is the student; or a float model's oscillation is to be watched.
        PhaseError: A simulation's is, which is not calibrated.
    """
    if aids.distillation is not None:
        if aids.distillation.teacher is model:
            raise InputError("the distillation teacher is the model that is trained; pass another, or a copy")
        aids.distillation.teacher.eval()
    work = AidsAtWork(aids, model, steps)
    try:
        yield work
    finally:
        work.release()


def _prefixed(aid: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{aid}/{name}": tensor for name, tensor in state.items()}
