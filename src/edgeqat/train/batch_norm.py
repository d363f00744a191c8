"""Batch norms that are trained: when their statistics are frozen, and how they are estimated afresh."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from edgeqat.arguments import check_batches
from edgeqat.errors import DataError, InputError
from edgeqat.ranks import Ranks
from edgeqat.signature import Batch, call
from edgeqat.simulate.model import SimulatedModel

__all__ = [
    "ALWAYS_LIVE",
    "BatchNormSchedule",
    "average_batch_norm",
    "first_inputs",
    "freeze_batch_norm",
    "reestimate_batch_norm",
    "running_statistics",
]


@dataclass(frozen=True)
class BatchNormSchedule:
    """What `fit` does with batch norms that are not folded.

    Attributes:
        freeze_after: Their statistics are frozen after so many epochs, 0 for from the start; None for never.
        reestimate_batches: Their statistics are estimated afresh over so many training batches at the end of each
            epoch whose statistics were not frozen, before validation; 0 for not.
    """

    freeze_after: int | None = None
    reestimate_batches: int = 0

    def __post_init__(self) -> None:
        for name in ("freeze_after", "reestimate_batches"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise InputError(f"found {name} {value}, wanted 0 or more")

    def frozen(self, epoch: int) -> bool:
        """Whether statistics are frozen in an epoch, counted from 0."""
        return self.freeze_after is not None and epoch >= self.freeze_after


ALWAYS_LIVE = BatchNormSchedule()
"""Batch norms train as in any model."""


def freeze_batch_norm(model: nn.Module) -> None:
    """Puts the batch norms of a model in training into evaluation: running statistics are used, and stay."""
    if isinstance(model, SimulatedModel):
        model.freeze_batch_norm()
    for norm in _norms(model):
        norm.eval()


def reestimate_batch_norm(model: nn.Module, batches: Iterable[Batch]) -> int:
    """Replaces the running statistics of every batch norm by their mean over `batches`.

    All batches count alike, and everything else runs in evaluation: what is estimated is what the batch norms see
    under the weights and grids of now, not the trail of past steps that a running average is.

    Args:
        model: Float or simulated; its mode is left as it was. A model without batch norms is left alone.
        batches: Inputs only.

    Returns:
        How many batches there were.

    Raises:
        InputError: `batches` is a single one.
        DataError: There was none.
    """
    check_batches(batches)
    norms = _norms(model)
    if not norms:
        return 0
    training, momenta, n = {m: m.training for m in model.modules()}, [norm.momentum for norm in norms], 0
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean
        norm.train()
    try:
        with torch.no_grad():
            for batch in batches:
                call(model, batch)
                n += 1
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, mode in training.items():
            module.training = mode
    if n == 0:
        raise DataError("found no batches to estimate batch-norm statistics over, wanted at least one")
    return n


def running_statistics(model: nn.Module) -> dict[str, Tensor]:
    """Means and variances of every batch norm, by the names of their buffers."""
    return {
        f"{name}.{kind}": getattr(module, kind)
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
        for kind in ("running_mean", "running_var")
    }


def average_batch_norm(model: nn.Module, ranks: Ranks) -> None:
    """Gives the running statistics of every batch norm the mean of what the processes have."""
    for statistics in running_statistics(model).values():
        statistics.copy_(ranks.total(statistics) / ranks.size)


def first_inputs(batches: Iterable[tuple[Batch, object]], n: int) -> Iterable[Batch]:
    """The inputs of the first n batches."""
    return (inputs for inputs, _ in islice(batches, n))


def _norms(model: nn.Module) -> list[_BatchNorm]:
    """The batch norms with running statistics."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
