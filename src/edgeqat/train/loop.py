"""The training loop: float models and simulations go through the same one, with the same budget."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Sized
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from edgeqat.errors import DataError, InputError
from edgeqat.metrics import Metric, MetricLike, evaluate, resolve_metric
from edgeqat.signature import Batch, call, call_of
from edgeqat.simulate.model import SimulatedModel
from edgeqat.simulate.phases import CONVERTED, QUANTIZED
from edgeqat.train.aids import NO_AIDS, AidsAtWork, QatAids, at_work
from edgeqat.train.batch_norm import (
    ALWAYS_LIVE,
    BatchNormSchedule,
    first_inputs,
    freeze_batch_norm,
    reestimate_batch_norm,
)
from edgeqat.train.finite import Place, check_state, explain_gradient, explain_loss, non_finite_state
from edgeqat.train.losses import Loss, resolve_loss
from edgeqat.train.precision import check_precision, computing_in, in_float32
from edgeqat.train.state import Epoch, History, Settings, TrainingState, capture_state, restore_state

__all__ = ["Epoch", "History", "TrainingState", "fit"]

OPTIMIZERS = ("sgd", "adamw")


@runtime_checkable
class HasEpochs(Protocol):
    """Data whose order and augmentation depend on the epoch."""

    def set_epoch(self, epoch: int) -> None:
        """Moves to an epoch."""
        ...


def fit(
    model: nn.Module,
    train_batches: Iterable[tuple[Batch, Any]],
    *,
    epochs: int,
    lr: float,
    optimizer: str = "sgd",
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    loss: str | Loss = "cross_entropy",
    precision: str = "32-true",
    max_grad_norm: float | None = None,
    batch_norm: BatchNormSchedule = ALWAYS_LIVE,
    aids: QatAids = NO_AIDS,
    seed: int = 0,
    validation_batches: Iterable[tuple[Batch, Any]] | None = None,
    metric: MetricLike = "top1",
    exact: str | None = "onnxruntime",
    on_step: Callable[[], None] | None = None,
    on_epoch: Callable[[Epoch], None] | None = None,
    start: TrainingState | None = None,
    on_checkpoint: Callable[[TrainingState], None] | None = None,
) -> History:
    """Trains a float model or a calibrated simulation, with a cosine schedule from `lr` to 0.

    Training that goes on from a `TrainingState` ends with the same bits as if it had never stopped, on one machine
    and with one number of threads, where the data's order depends on the epoch alone (`set_epoch`).

    Args:
        model: Trained in place; left in eval mode.
        train_batches: (inputs, targets); iterated once an epoch, after its `set_epoch` if it has one.
        epochs: 0 leaves the model as it is.
        lr: Learning rate at the start.
        optimizer: "sgd" (with Nesterov momentum) or "adamw".
        momentum: Of sgd.
        weight_decay: Applied to weights, not to biases and normalisation parameters.
        loss: Name or callable (outputs, targets) -> 0-d tensor.
        precision: "32-true", or "bf16-mixed" for forward passes under torch.autocast in bfloat16: quicker where the
            processor has it. Weights, grids, rounding, outputs and the optimizer stay in float32, and so do batch
            norms' re-estimation and validation.
        max_grad_norm: Gradients are scaled down to this norm; None leaves them. Without batch norm behind them,
            folded convs diverge from one step that is too large: fine-tuning wants a bound.
        batch_norm: What happens to batch norms that are not folded.
        aids: What else helps training at few bits: a teacher, moving averages, freezing of weights that oscillate.
        seed: Seeds dropout and whatever else in the model is random.
        validation_batches: Evaluated after each epoch.
        metric: The validation metric: a name, or a callable as `edgeqat.metrics.resolve_metric` takes it.
        exact: The arithmetic that a simulation is validated in, which is what will be shipped; None validates the
            dequantized simulation. Without effect on a float model.
        on_step: Called after each step.
        on_epoch: Called after each epoch.
        start: What an earlier call gave to `on_checkpoint`: goes on after that epoch.
        on_checkpoint: Called after each epoch with a copy of all that the next one depends on.

    Returns:
        All epochs, those before `start` included.

    Raises:
        DataError: There are no batches, or a batch holds NaN or infinity (sample named).
        TrainingError: The loss, a gradient or a parameter became NaN or infinite; epoch, step and layer are named.
            The model is of no use then, the last state given to `on_checkpoint` is.
        CheckpointError: `start` was made with other settings or for another model.
        InputError: Unknown optimizer, loss, metric or precision; or aids that do not fit this model, its outputs or
            targets.
        PhaseError: Oscillation is to be watched in a simulation that is not calibrated.
    """
    criterion, steps = resolve_loss(loss), _length(train_batches)
    optim = _optimizer(model, optimizer, lr, momentum, weight_decay)
    chosen = resolve_metric(metric)
    check_precision(precision)
    told = aids.describe()
    settings = Settings(
        optimizer, lr, momentum, weight_decay, max_grad_norm, batch_norm, epochs, steps, seed, told, precision
    )
    if isinstance(model, SimulatedModel) and model.phase == CONVERTED:
        model.set_phase(QUANTIZED)
    history: list[Epoch] = [] if start is None else list(start.history)
    torch.manual_seed(seed)
    if start is not None:
        restore_state(start, model, optim, settings)
    with at_work(aids, model, epochs * steps) as work:
        if start is not None:
            work.restore(start.aids)
        for index in range(len(history), epochs):
            started = time.perf_counter()
            mean = _train_epoch(model, optim, criterion, train_batches, settings, index, work, on_step)
            work.settle()
            with work.evaluated(keep=index + 1 == epochs):
                estimated = work.batches_to_reestimate(batch_norm, index)
                if estimated > 0:
                    reestimate_batch_norm(model, first_inputs(train_batches, estimated))
                model.eval()
                found = None if validation_batches is None else _validate(model, validation_batches, chosen, exact)
            epoch = Epoch(index + 1, mean, optim.param_groups[0]["lr"], found, time.perf_counter() - started)
            history.append(epoch)
            if on_checkpoint is not None:
                on_checkpoint(capture_state(model, optim, settings, history, work.state()))
            if on_epoch is not None:  # an epoch that was told of is kept
                on_epoch(epoch)
        model.eval()
        return History(tuple(history), work.counts())


def _length(batches: Iterable[Any]) -> int:
    if not isinstance(batches, Sized):
        raise DataError("training batches have no length; pass a list, a DataLoader or anything with __len__")
    if len(batches) == 0:
        raise DataError("found no training batches, wanted at least one")
    return len(batches)


def _cosine(progress: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def _set_lr(optim: torch.optim.Optimizer, lr: float) -> None:
    for group in optim.param_groups:
        group["lr"] = lr


def _optimizer(model: nn.Module, name: str, lr: float, momentum: float, weight_decay: float) -> torch.optim.Optimizer:
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=momentum > 0)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr)
    raise InputError(f"found the optimizer {name!r}, wanted one of {', '.join(OPTIMIZERS)}")


def _train_epoch(
    model: nn.Module,
    optim: torch.optim.Optimizer,
    criterion: Loss,
    batches: Iterable[tuple[Batch, Any]],
    settings: Settings,
    index: int,
    work: AidsAtWork,
    on_step: Callable[[], None] | None,
) -> float:
    """The mean loss of one epoch, counted from 0."""
    known = non_finite_state(model)
    total, count = 0.0, 0
    if isinstance(batches, HasEpochs):
        batches.set_epoch(index)
    model.train()
    if settings.batch_norm.frozen(index):
        freeze_batch_norm(model)
    for step, (inputs, targets) in enumerate(batches):
        _set_lr(optim, settings.lr * _cosine((index + step / settings.steps) / settings.epochs))
        place = Place(index, step, batches)
        total += _step(model, optim, criterion, inputs, targets, settings, known, place, work)
        work.after_step(index * settings.steps + step)
        count += 1
        if on_step is not None:
            on_step()
    check_state(model, known, index)
    return total / count


def _step(
    model: nn.Module,
    optim: torch.optim.Optimizer,
    criterion: Loss,
    inputs: Batch,
    targets: Any,
    settings: Settings,
    known: frozenset[str],
    place: Place,
    work: AidsAtWork,
) -> float:
    """One step; it is not taken where the loss or a gradient is not finite."""
    args, kwargs = call_of(inputs)
    rng = torch.get_rng_state()
    optim.zero_grad(set_to_none=True)
    step = place.epoch * settings.steps + place.step
    with computing_in(settings.precision, model):
        outputs = in_float32(model(*args, **kwargs))
        loss = work.loss(criterion(outputs, targets), inputs, outputs, targets, step)
    loss.backward()  # type: ignore[no-untyped-call]
    value = float(loss.detach())
    if not math.isfinite(value):
        with computing_in(settings.precision, model):
            raise explain_loss(model, inputs, targets, value, rng, known, place)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if not math.isfinite(float(norm)):
        raise explain_gradient(model, float(norm), place)
    if settings.max_grad_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), settings.max_grad_norm, norm)
    optim.step()
    return value


def _validate(model: nn.Module, batches: Iterable[tuple[Batch, Any]], metric: Metric, exact: str | None) -> float:
    context: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if isinstance(model, SimulatedModel) and exact is not None and model.phase == "quantized":
        context = model.exact(exact)
    with context:
        scores = evaluate(lambda inputs: call(model, inputs), batches, metric)
    return metric.value(scores.statistics.double().mean(0))
