"""NaN and infinity in training: found at small cost while it runs, traced to their cause once they are there."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from edgeqat.errors import DataError, InputError, TrainingError
from edgeqat.signature import Batch, call_of
from edgeqat.simulate.model import SimulatedModel

__all__ = ["Place", "all_finite", "check_state", "explain_gradient", "explain_loss", "non_finite_state"]

ADVICE = "lower the learning rate, or bound the gradient norm"


@runtime_checkable
class HasSamples(Protocol):
    """Data that knows which samples make a batch."""

    def samples_of(self, batch: int) -> Tensor:
        """Indices of a batch's samples in the data set, in the epoch that it is at, int64 [B]."""
        ...


@dataclass(frozen=True)
class Place:
    """A training step, counted from 0, and the data it comes from."""

    epoch: int
    step: int
    batches: Iterable[Any]

    def __str__(self) -> str:
        return f"epoch {self.epoch + 1}, step {self.step + 1}"


def all_finite(value: Any) -> bool:
    """Whether every floating-point tensor in a structure is free of NaN and infinity."""
    return all(bool(torch.isfinite(leaf).all()) for leaf in pytree.tree_leaves(value) if _floats(leaf))


def non_finite_state(model: nn.Module) -> frozenset[str]:
    """Names of the parameters and buffers that hold NaN or infinity, as masks and uncalibrated grids do."""
    state = [*model.named_parameters(), *model.named_buffers()]
    return frozenset(name for name, tensor in state if not all_finite(tensor))


def check_state(model: nn.Module, known: frozenset[str], epoch: int) -> None:
    """Checks a model after an epoch (counted from 0): nothing may be NaN or infinite that was finite before.

    Raises:
        TrainingError: Something is; the first one is named.
    """
    for name in non_finite_state(model) - known:
        raise TrainingError(f"epoch {epoch + 1}: {name} is not finite after its last step; {ADVICE}")


def explain_loss(
    model: nn.Module, inputs: Batch, targets: Any, value: float, rng: Tensor, known: frozenset[str], place: Place
) -> InputError:
    """Why the loss of a batch is NaN or infinite: the data, the weights, or the first layer whose output is.

    Args:
        model: In the state in which it computed the loss; the batch is run again.
        inputs: The batch.
        targets: Its targets.
        value: The loss.
        rng: State of the CPU generator before the step, so that dropout is repeated.
        known: What held NaN or infinity before training, see `non_finite_state`.
        place: The step.
    """
    for what, data in (("input", inputs), ("target", targets)):
        sample = _first_bad_sample(data)
        if sample is not None:
            return DataError(
                f"{place}: the {what} of {_name_sample(sample, place)} is NaN or infinite; clean the data"
            )
    head = f"{place}: the loss is {value}"
    for name in sorted(non_finite_state(model) - known):
        return TrainingError(f"{head}: {name} is not finite since an earlier step; {ADVICE}")
    torch.set_rng_state(rng)
    layer = _first_bad_layer(model, inputs)
    if layer is None:
        return TrainingError(f"{head}, though every layer's output is finite: it comes from the loss itself; {ADVICE}")
    return TrainingError(f"{head}: the first output that is not finite is that of {layer}; {ADVICE}")


def explain_gradient(model: nn.Module, norm: float, place: Place) -> InputError:
    """Why the norm of the gradients of a step is NaN or infinite, though its loss is finite."""
    for name, parameter in reversed(list(model.named_parameters())):
        # Backward comes to the last layers first.
        if parameter.grad is not None and not all_finite(parameter.grad):
            return TrainingError(f"{place}: the loss is finite, but the gradient of {name} is not; {ADVICE}")
    return TrainingError(f"{place}: the gradients are finite, but their norm is {norm}; {ADVICE}")


def _floats(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())


def _first_bad_sample(data: Any) -> int | None:
    found = []
    for leaf in pytree.tree_leaves(data):
        if _floats(leaf) and not all_finite(leaf):
            bad = ~torch.isfinite(leaf.detach().cpu())
            found.append(int(bad.reshape(len(bad), -1).any(1).nonzero()[0]) if bad.dim() > 0 else 0)
    return min(found, default=None)


def _name_sample(position: int, place: Place) -> str:
    if isinstance(place.batches, HasSamples):
        return f"training sample {int(place.batches.samples_of(place.step)[position])}"
    return f"sample {position} of the batch"


def _first_bad_layer(model: nn.Module, inputs: Batch) -> str | None:
    """Runs a batch again, and names the first layer whose output is not finite; None if there is none."""
    with torch.no_grad():
        if isinstance(model, SimulatedModel):
            return next((name for name, output in model.traced(inputs) if not all_finite(output)), None)
        found: list[str] = []
        handles = [
            module.register_forward_hook(_watch(found, name or "the model itself"))
            for name, module in model.named_modules()
        ]
        try:
            args, kwargs = call_of(inputs)
            model(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        return next(iter(found), None)


def _watch(found: list[str], name: str) -> Callable[[nn.Module, Any, Any], None]:
    def look(_: nn.Module, __: Any, output: Any) -> None:
        if not all_finite(output):
            found.append(name)

    return look
