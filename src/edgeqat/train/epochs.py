"""The epochs of one training: their steps, what closes them, and the states in between that are kept."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice, zip_longest
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from edgeqat.arguments import pair_of
from edgeqat.errors import DataError
from edgeqat.metrics import Metric, checked_statistics
from edgeqat.signature import Batch, call
from edgeqat.simulate.model import SimulatedModel
from edgeqat.simulate.phases import QUANTIZED
from edgeqat.train.aids import AidsAtWork
from edgeqat.train.batch_norm import first_inputs, freeze_batch_norm, reestimate_batch_norm
from edgeqat.train.engine import Engine
from edgeqat.train.finite import Place, check_state, non_finite_state
from edgeqat.train.state import Epoch, Settings, TrainingState, Underway, capture_state
from edgeqat.train.steps import Steps

__all__ = ["Checkpoints", "Epochs", "Validation"]

Pairs = Iterable[tuple[Batch, Any]]


@runtime_checkable
class HasEpochs(Protocol):
    """Data whose order and augmentation depend on the epoch."""

    def set_epoch(self, epoch: int) -> None:
        """Moves to an epoch."""
        ...


@runtime_checkable
class HasPosition(Protocol):
    """Data that need not be read from the beginning."""

    def from_batch(self, first: int) -> Iterator[tuple[Batch, Any]]:
        """An epoch from its batch `first` on, counted from 0."""
        ...


@runtime_checkable
class HasWeights(Protocol):
    """Data of which a process gets a share, not always as large as the others'."""

    def weight_of(self, batch: int) -> float:
        """The samples of its share of a batch, by those of the mean share."""
        ...


@dataclass(frozen=True)
class Validation:
    """What an epoch is judged by: batches (this process's own), the metric, and the arithmetic of a simulation."""

    batches: Pairs
    metric: Metric
    exact: str | None


@dataclass(frozen=True)
class Checkpoints:
    """When states are kept: see `fit`."""

    keep: Callable[[TrainingState], None] | None
    seconds: float | None
    should_stop: Callable[[], bool] | None


class Epochs:
    """Runs the epochs of one training.

    Args:
        model: In training.
        optimizer: Of its parameters.
        settings: Of the training.
        work: Aids at work.
        engine: What it runs on.
        steps: Takes its steps.
        checkpoints: When states are kept.
        start: Where it goes on from.

    Attributes:
        history: The epochs done.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        settings: Settings,
        work: AidsAtWork,
        engine: Engine,
        steps: Steps,
        checkpoints: Checkpoints,
        start: TrainingState | None,
    ) -> None:
        self._model, self._optimizer, self._settings = model, optimizer, settings
        self._work, self._engine, self._steps, self._checkpoints = work, engine, steps, checkpoints
        self.history: list[Epoch] = [] if start is None else list(start.history)
        self._underway = None if start is None else start.underway

    def run_next(
        self, batches: Pairs, validation: Validation | None, on_step: Callable[[float], None] | None
    ) -> Epoch:
        """Runs the next epoch to its end, from where it was left."""
        index, model, work = len(self.history), self._model, self._work
        begun, self._underway = self._underway or Underway(0, 0.0, 0.0), None
        started = time.perf_counter() - begun.seconds
        mean = self._train(batches, index, begun, started, on_step)
        work.settle()
        self._engine.settle()
        with work.evaluated(keep=index + 1 == self._settings.epochs):
            estimated = work.batches_to_reestimate(self._settings.batch_norm, index)
            if estimated > 0:
                with self._engine.ranks.together():
                    reestimate_batch_norm(model, map(self._engine.to_device, first_inputs(batches, estimated)))
                self._engine.settle()
            model.eval()
            found = None if validation is None else self._validate(validation)
        lr = self._lr(index, self._settings.steps - 1)
        epoch = Epoch(index + 1, mean, lr, found, time.perf_counter() - started)
        self.history.append(epoch)
        self._keep(None)
        return epoch

    def _train(
        self, batches: Pairs, index: int, begun: Underway, started: float, on_step: Callable[[float], None] | None
    ) -> float:
        """The mean loss of one epoch, counted from 0."""
        known, total, kept = non_finite_state(self._model), begun.loss_sum, time.monotonic()
        if isinstance(batches, HasEpochs):
            batches.set_epoch(index)
        self._model.train()
        if self._settings.batch_norm.frozen(index):
            freeze_batch_norm(self._model)
        done = begun.steps
        left = self._engine.each(_from(batches, begun.steps), self._settings.steps - begun.steps)
        for inputs, targets in map(pair_of, left):
            for group in self._optimizer.param_groups:
                group["lr"] = self._lr(index, done)
            weight = batches.weight_of(done) if isinstance(batches, HasWeights) else 1.0
            loss = self._steps.take(inputs, targets, weight, known, Place(index, done, batches))
            self._work.after_step(index * self._settings.steps + done)
            total, done = total + loss, done + 1
            if on_step is not None:
                on_step(loss)
            stop, due = self._asked(time.monotonic() - kept)
            if stop or due:
                self._keep(Underway(done, total, time.perf_counter() - started))
                kept = time.monotonic()
            if stop:
                raise KeyboardInterrupt
        with self._engine.ranks.alike():
            check_state(self._model, known, index)
        return total / done

    def _lr(self, epoch: int, step: int) -> float:
        """The learning rate of a step: a cosine from that of the settings to 0."""
        progress = (epoch + step / self._settings.steps) / self._settings.epochs
        return self._settings.lr * 0.5 * (1.0 + math.cos(math.pi * progress))

    def _asked(self, seconds: float) -> tuple[bool, bool]:
        """Whether any process is asked to stop, and whether a state is to be kept after so many seconds without."""
        wanted, every = self._checkpoints.should_stop, self._checkpoints.seconds
        stop, due = wanted is not None and wanted(), every is not None and seconds >= every
        if self._engine.ranks.size == 1:
            return stop, due
        agreed = self._engine.ranks.largest(torch.tensor([stop, due], dtype=torch.int64)).tolist()
        return bool(agreed[0]), bool(agreed[1])

    def _keep(self, underway: Underway | None) -> None:
        if self._checkpoints.keep is None:
            return
        aids, ranks = self._work.state(), self._engine.ranks
        state = capture_state(self._model, self._optimizer, self._settings, self.history, aids, underway, ranks)
        with ranks.together():
            self._checkpoints.keep(state)

    def _validate(self, validation: Validation) -> float:
        """The metric over all batches of all processes."""
        model, exact = self._model, validation.exact
        context: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        ranks, to_device = self._engine.ranks, _as_it_is
        with ranks.together(), torch.no_grad():
            if isinstance(model, SimulatedModel) and exact is not None and model.phase == QUANTIZED:
                context = model.exact(exact)  # integers are computed on the CPU
            else:
                to_device = self._engine.to_device
            with context:
                own = [self._statistics(*pair_of(batch), validation.metric, to_device) for batch in validation.batches]
        # Batches are dealt out in turn: in their own order the sum does not depend on the number of processes.
        in_order = [found for round_ in zip_longest(*ranks.of_each(own)) for found in round_ if found is not None]
        if not in_order:
            with ranks.alike():
                raise DataError("found no batches to validate on, wanted at least one")
        return validation.metric.value(torch.cat(in_order).double().mean(0))

    def _statistics(self, inputs: Batch, targets: Any, metric: Metric, to_device: Callable[[Batch], Batch]) -> Tensor:
        outputs: Any = self._engine.to_host(call(self._model, to_device(inputs)))
        return checked_statistics(metric, outputs, targets)


def _as_it_is(data: Batch) -> Batch:
    return data


def _from(batches: Pairs, first: int) -> Iterator[tuple[Batch, Any]]:
    if isinstance(batches, HasPosition):
        return batches.from_batch(first)
    return islice(batches, first, None) if first else iter(batches)
