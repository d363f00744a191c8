"""The training loop: float models and simulations go through the same one, with the same budget."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sized
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from edgeqat.arguments import PAIRS, check_batches
from edgeqat.errors import DataError, InputError, PhaseError
from edgeqat.metrics import MetricLike, resolve_metric
from edgeqat.signature import Batch
from edgeqat.simulate.model import SimulatedModel
from edgeqat.simulate.phases import CONVERTED, FLOAT, QUANTIZED
from edgeqat.train.aids import NO_AIDS, QatAids, at_work
from edgeqat.train.batch_norm import ALWAYS_LIVE, BatchNormSchedule
from edgeqat.train.engine import Engine
from edgeqat.train.epochs import Checkpoints, Epochs, Validation
from edgeqat.train.losses import Loss, explained, resolve_loss
from edgeqat.train.precision import check_precision
from edgeqat.train.state import Epoch, History, Settings, TrainingState, restore_state
from edgeqat.train.steps import Steps

if TYPE_CHECKING:
    from lightning_fabric import Fabric

__all__ = ["Epoch", "History", "TrainingState", "fit"]

OPTIMIZERS = ("sgd", "adamw")


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
    fabric: Fabric | None = None,
    accumulate: int = 1,
    on_step: Callable[[float], None] | None = None,
    on_epoch: Callable[[Epoch], None] | None = None,
    start: TrainingState | None = None,
    on_checkpoint: Callable[[TrainingState], None] | None = None,
    checkpoint_seconds: float | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> History:
    """Trains a float model or a calibrated simulation, with a cosine schedule from `lr` to 0.

    Training that goes on from a `TrainingState` ends with the same bits as if it had never stopped, on one machine
    and with one number of threads and processes, where the data's order depends on the epoch alone (`set_epoch`).

    Args:
        model: Trained in place; left in eval mode.
        train_batches: (inputs, targets); iterated once an epoch, after its `set_epoch` if it has one.
        epochs: 0 leaves the model as it is.
        lr: Learning rate at the start.
        optimizer: "sgd" (with Nesterov momentum) or "adamw".
        momentum: Of sgd.
        weight_decay: Applied to weights, not to biases and normalisation parameters.
        loss: Name or callable (outputs, targets) -> 0-d tensor: the mean over samples, as parts of a batch are
            weighed by how many they hold.
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
        fabric: A launched `lightning_fabric.Fabric`: the devices and processes that train. Each process calls this
            with its own share of every batch and of the validation batches, as `edgeqat.data.batches.Batches` cuts
            them; gradients are the mean over all. Its own precision stays "32-true". The model, and a teacher, end on
            its device.
        accumulate: Parts that a batch goes through the model in, where memory is short.
        on_step: Called after each step with its loss.
        on_epoch: Called after each epoch.
        start: What an earlier call gave to `on_checkpoint`: goes on after that step.
        on_checkpoint: Called after each epoch with a copy of all that the next step depends on; in every process.
        checkpoint_seconds: Within epochs it is called too, after so many seconds without.
        should_stop: Asked after each step; where it says so, `on_checkpoint` is called, and KeyboardInterrupt raised.

    Returns:
        All epochs, those before `start` included.

    Raises:
        DataError: There are no batches, or a batch holds NaN or infinity (sample named); or processes have not
            equally many.
        TrainingError: The loss, a gradient or a parameter became NaN or infinite; epoch, step and layer are named.
            The model is of no use then, the last state given to `on_checkpoint` is.
        CheckpointError: `start` was made with other settings or for another model.
        ModelError: The loss of a batch cannot be computed, or has no gradient.
        InputError: Unknown optimizer, loss, metric or precision; a batch is no (inputs, targets); or aids that do not
            fit this model, its outputs or targets.
        PhaseError: The simulation is not calibrated.
        LostProcessError: Another process is gone, or has not answered in time.
        KeyboardInterrupt: `should_stop` said so.
    """
    criterion, steps = explained(resolve_loss(loss), loss), _length(train_batches)
    chosen = resolve_metric(metric)
    check_precision(precision)
    if accumulate < 1:
        raise InputError(f"found accumulate {accumulate}, wanted 1 or more")
    told = aids.describe()
    settings = Settings(
        optimizer, lr, momentum, weight_decay, max_grad_norm, batch_norm, epochs, steps, seed, told, precision
    )
    if isinstance(model, SimulatedModel) and model.phase == CONVERTED:
        model.set_phase(QUANTIZED)
    optim = _optimizer(model, optimizer, lr, momentum, weight_decay)
    engine = Engine(fabric, model)
    with engine.ranks.alike():
        engine.check_equal(steps)
    if aids.distillation is not None:
        engine.to_device(aids.distillation.teacher)
    engine.seed(seed)
    _begin_at(start, model, optim, settings, engine)
    with at_work(aids, model, epochs * steps) as work:
        if start is not None:
            work.restore(start.aids)
        step = Steps(model, optim, criterion, settings, work, engine, accumulate)
        validation = None if validation_batches is None else Validation(validation_batches, chosen, exact)
        checkpoints = Checkpoints(on_checkpoint, checkpoint_seconds, should_stop)
        running = Epochs(model, optim, settings, work, engine, step, checkpoints, start)
        while len(running.history) < epochs:
            epoch = running.run_next(train_batches, validation, on_step)
            if on_epoch is not None:  # an epoch that was told of is kept
                on_epoch(epoch)
        model.eval()
        return History(tuple(running.history), work.counts())


def _length(batches: Iterable[Any]) -> int:
    check_batches(batches, PAIRS)
    if not isinstance(batches, Sized):
        raise DataError("training batches have no length; pass a list, a DataLoader or anything with __len__")
    if len(batches) == 0:
        raise DataError("found no training batches, wanted at least one")
    return len(batches)


def _begin_at(
    start: TrainingState | None,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    settings: Settings,
    engine: Engine,
) -> None:
    """Restores what training goes on from; refuses a simulation without grids, which would be trained in float."""
    if start is not None:
        with engine.ranks.alike():
            restore_state(start, model, optimizer, settings, engine.ranks)
    if not isinstance(model, SimulatedModel) or model.phase != FLOAT:
        return
    if not all(quantizer.calibrated for quantizer in model.activation_quantizers().values()):
        raise PhaseError(
            "fit wants a calibrated simulation, found float; calibrate first: edgeqat.calibrate(sim, batches)"
        )


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
