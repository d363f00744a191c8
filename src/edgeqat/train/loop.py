"""The training loop: float models and simulations go through the same one, with the same budget."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Sized
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from edgeqat.errors import DataError, InputError
from edgeqat.metrics import Metric, MetricLike, evaluate, resolve_metric
from edgeqat.signature import Batch, call, call_of
from edgeqat.simulate.model import SimulatedModel
from edgeqat.train.losses import Loss, resolve_loss

__all__ = ["Epoch", "History", "fit"]

OPTIMIZERS = ("sgd", "adamw")


@dataclass(frozen=True)
class Epoch:
    """One epoch: mean training loss, learning rate at its end, validation metric (None without validation)."""

    index: int
    loss: float
    lr: float
    metric: float | None
    seconds: float


@dataclass(frozen=True)
class History:
    """What training did, epoch by epoch."""

    epochs: tuple[Epoch, ...]


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
    max_grad_norm: float | None = None,
    seed: int = 0,
    validation_batches: Iterable[tuple[Batch, Any]] | None = None,
    metric: MetricLike = "top1",
    exact: str | None = "onnxruntime",
    on_step: Callable[[], None] | None = None,
    on_epoch: Callable[[Epoch], None] | None = None,
) -> History:
    """Trains a float model or a calibrated simulation, with a cosine schedule from `lr` to 0.

    Args:
        model: Trained in place; left in eval mode.
        train_batches: (inputs, targets); iterated once an epoch, after its `set_epoch` if it has one.
        epochs: 0 leaves the model as it is.
        lr: Learning rate at the start.
        optimizer: "sgd" (with Nesterov momentum) or "adamw".
        momentum: Of sgd.
        weight_decay: Applied to weights, not to biases and normalisation parameters.
        loss: Name or callable (outputs, targets) -> 0-d tensor.
        max_grad_norm: Gradients are scaled down to this norm; None leaves them. Without batch norm behind them,
            folded convs diverge from one step that is too large: fine-tuning wants a bound.
        seed: Seeds dropout and whatever else in the model is random.
        validation_batches: Evaluated after each epoch.
        metric: The validation metric: a name, or a callable as `edgeqat.metrics.resolve_metric` takes it.
        exact: The arithmetic that a simulation is validated in, which is what will be shipped; None validates the
            dequantized simulation. Without effect on a float model.
        on_step: Called after each step.
        on_epoch: Called after each epoch.

    Raises:
        DataError: The loss is NaN or infinite, or there are no batches.
        InputError: Unknown optimizer, loss or metric.
    """
    criterion, steps = resolve_loss(loss), _length(train_batches)
    optim = _optimizer(model, optimizer, lr, momentum, weight_decay)
    chosen = resolve_metric(metric)
    history: list[Epoch] = []
    torch.manual_seed(seed)
    for index in range(epochs):
        started, total, count = time.perf_counter(), 0.0, 0
        if isinstance(train_batches, HasEpochs):
            train_batches.set_epoch(index)
        model.train()
        for step, (inputs, targets) in enumerate(train_batches):
            _set_lr(optim, lr * _cosine((index + step / steps) / epochs))
            value = _step(model, optim, criterion, inputs, targets, max_grad_norm)
            if not math.isfinite(value):
                raise DataError(f"the loss is {value} in epoch {index + 1}, step {step + 1}; lower the learning rate")
            total, count = total + value, count + 1
            if on_step is not None:
                on_step()
        model.eval()
        found = None if validation_batches is None else _validate(model, validation_batches, chosen, exact)
        epoch = Epoch(index + 1, total / count, optim.param_groups[0]["lr"], found, time.perf_counter() - started)
        history.append(epoch)
        if on_epoch is not None:
            on_epoch(epoch)
    model.eval()
    return History(tuple(history))


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


def _step(
    model: nn.Module,
    optim: torch.optim.Optimizer,
    criterion: Loss,
    inputs: Batch,
    targets: Any,
    max_grad_norm: float | None,
) -> float:
    args, kwargs = call_of(inputs)
    optim.zero_grad(set_to_none=True)
    value = criterion(model(*args, **kwargs), targets)
    value.backward()  # type: ignore[no-untyped-call]
    if max_grad_norm is not None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    optim.step()
    return float(value.detach())


def _validate(model: nn.Module, batches: Iterable[tuple[Batch, Any]], metric: Metric, exact: str | None) -> float:
    context: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if isinstance(model, SimulatedModel) and exact is not None and model.phase == "quantized":
        context = model.exact(exact)
    with context:
        scores = evaluate(lambda inputs: call(model, inputs), batches, metric)
    return metric.value(scores.statistics.double().mean(0))
