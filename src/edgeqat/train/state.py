"""Where training stands between two steps: all that `fit` needs to go on as if it had never stopped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor, nn

from edgeqat.errors import CheckpointError
from edgeqat.ranks import ALONE, Ranks
from edgeqat.train.batch_norm import BatchNormSchedule, running_statistics
from edgeqat.train.checkpoint import put_weights, weights_of
from edgeqat.train.oscillation import Oscillating

__all__ = ["Epoch", "History", "Settings", "TrainingState", "Underway", "capture_state", "restore_state"]


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
    """What training did, epoch by epoch; and how many weights oscillate at its end, where that was watched."""

    epochs: tuple[Epoch, ...]
    oscillating: tuple[Oscillating, ...] = ()


@dataclass(frozen=True)
class Settings:
    """What decides each step, beside the data and the loss.

    `steps` is the number of batches an epoch; `aids` is what `QatAids.describe` says.
    """

    optimizer: str
    lr: float
    momentum: float
    weight_decay: float
    max_grad_norm: float | None
    batch_norm: BatchNormSchedule
    epochs: int
    steps: int
    seed: int
    aids: str = "none"
    precision: str = "32-true"


@dataclass(frozen=True)
class Underway:
    """An epoch that is not done: how many of its steps are, the sum of their losses, and the seconds they took."""

    steps: int
    loss_sum: float
    seconds: float


@dataclass(frozen=True, eq=False)
class TrainingState:
    """Training between two steps; copies on the CPU, which later steps do not change.

    Attributes:
        settings: What `fit` was called with; going on wants the same.
        history: The epochs done; the next one is number `len(history)`, counted from 0.
        model: The state_dict, grids included.
        optimizer: Its tensors (momentum and the like), by name of the parameter.
        rng: States of the generators that dropout draws from, uint8, by device ("cpu", "cuda:0"); those of other
            processes than the first by "rank1/cpu" and the like.
        aids: What moving averages and the watch over oscillation know, by "aid/what".
        underway: The part of the next epoch that is done; None between epochs.
        others: Within an epoch, the running statistics of batch norms in other processes than the first, by
            "rank1/bn.running_mean" and the like.
    """

    settings: Settings
    history: tuple[Epoch, ...]
    model: Mapping[str, Tensor]
    optimizer: Mapping[str, Mapping[str, Tensor]]
    rng: Mapping[str, Tensor]
    aids: Mapping[str, Tensor] = field(default_factory=dict)
    underway: Underway | None = None
    others: Mapping[str, Tensor] = field(default_factory=dict)


def capture_state(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    settings: Settings,
    history: Sequence[Epoch],
    aids: Mapping[str, Tensor],
    underway: Underway | None = None,
    ranks: Ranks = ALONE,
) -> TrainingState:
    """A copy of all that the next step depends on; all processes call it, and all get the same.

    Raises:
        ModelError: The model's state_dict holds something that is no tensor.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    buffers = {
        names[id(parameter)]: {key: value.detach().cpu().contiguous().clone() for key, value in kept.items()}
        for parameter, kept in optimizer.state.items()
    }
    own = {"cpu": torch.get_rng_state()}
    for index in _gpus(model):
        own["cuda:0" if ranks.size > 1 else f"cuda:{index}"] = torch.cuda.get_rng_state(index)
    rng = {_of_rank(i, device): state for i, found in enumerate(ranks.of_each(own)) for device, state in found.items()}
    statistics = {} if underway is None or ranks.size == 1 else running_statistics(model)
    copies = {name: tensor.detach().cpu().clone() for name, tensor in statistics.items()}
    others = {f"rank{i}/{n}": t for i, found in enumerate(ranks.of_each(copies)) if i for n, t in found.items()}
    return TrainingState(settings, tuple(history), weights_of(model), buffers, rng, aids, underway, others)


def restore_state(
    state: TrainingState, model: nn.Module, optimizer: torch.optim.Optimizer, settings: Settings, ranks: Ranks = ALONE
) -> None:
    """Puts `model`, a fresh `optimizer` and the random generators where they were.

    A process that was not there then keeps the generators that it has.

    Raises:
        CheckpointError: The state was made with other settings, or its optimizer is not this model's.
        ModelError: Its weights do not fit the model.
    """
    for setting in fields(Settings):
        found, wanted = getattr(state.settings, setting.name), getattr(settings, setting.name)
        if found != wanted:
            raise CheckpointError(
                f"the training state was made with {setting.name} {found}, this training has {wanted}; start afresh"
            )
    parameters = dict(model.named_parameters())
    for name, kept in state.optimizer.items():
        shapes = [tuple(value.shape) for key, value in kept.items() if key != "step"]
        if name not in parameters or any(shape != tuple(parameters[name].shape) for shape in shapes):
            raise CheckpointError(f"the training state's optimizer does not fit the model at {name}; start afresh")
    put_weights(model, state.model, "the training state")
    with torch.no_grad():
        for name, tensor in running_statistics(model).items():
            if f"rank{ranks.rank}/{name}" in state.others:
                tensor.copy_(state.others[f"rank{ranks.rank}/{name}"])
    for name, kept in state.optimizer.items():
        optimizer.state[parameters[name]] = {
            key: value.clone() if key == "step" else _like(parameters[name], value) for key, value in kept.items()
        }
    if _of_rank(ranks.rank, "cpu") in state.rng:
        torch.set_rng_state(state.rng[_of_rank(ranks.rank, "cpu")])
    for index in _gpus(model):
        name = _of_rank(ranks.rank, "cuda:0" if ranks.size > 1 else f"cuda:{index}")
        if name in state.rng:
            torch.cuda.set_rng_state(state.rng[name], index)


def _of_rank(rank: int, device: str) -> str:
    return device if rank == 0 else f"rank{rank}/{device}"


def _like(parameter: nn.Parameter, value: Tensor) -> Tensor:
    """`value` in the memory layout that the optimizer would have given it, so that the same kernels run."""
    return torch.empty_like(parameter, requires_grad=False).copy_(value)


def _gpus(model: nn.Module) -> list[int]:
    devices = {parameter.device for parameter in model.parameters()}
    return sorted({device.index for device in devices if device.type == "cuda" and device.index is not None})
