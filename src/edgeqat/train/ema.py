"""The exponential moving average of what is trained: weights before quantization, biases, learned scales.

    average <- average + (1 - d) * (parameter - average)        d = min(decay, (1 + step) / (10 + step))

`step` counts from 0, so that early averages, which hold little, forget quickly where training began.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn

from edgeqat.errors import CheckpointError, InputError

__all__ = ["Averages", "Ema"]


@dataclass(frozen=True)
class Ema:
    """Each epoch is validated with the averages in place of the parameters, and training ends with them.

    Attributes:
        decay: What an average keeps of itself in a step, 0 to below 1, once there were enough steps.
        reestimate_batches: Over how many training batches the statistics of batch norms that are not folded are
            estimated afresh for the averages, where `BatchNormSchedule.reestimate_batches` does not say.
    """

    decay: float = 0.999
    reestimate_batches: int = 50

    def __post_init__(self) -> None:
        if not 0.0 <= self.decay < 1.0:
            raise InputError(f"found the EMA decay {self.decay}, wanted 0 to below 1")
        if self.reestimate_batches < 1:
            raise InputError(f"found reestimate_batches {self.reestimate_batches}, wanted 1 or more")

    def decay_at(self, step: int) -> float:
        """What an average keeps in a step, counted from 0."""
        return min(self.decay, (1 + step) / (10 + step))


class Averages:
    """The averages of one training; they begin at the parameters as they are."""

    def __init__(self, settings: Ema, model: nn.Module) -> None:
        self._settings, self._model = settings, model
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._averages = {name: p.detach().clone() for name, p in self._parameters.items()}

    def update(self, step: int) -> None:
        """Takes in the parameters after a step, counted from 0 over all epochs."""
        new = 1.0 - self._settings.decay_at(step)
        with torch.no_grad():
            for name, average in self._averages.items():
                average.lerp_(self._parameters[name], new)

    @contextmanager
    def in_place(self, keep: bool) -> Iterator[None]:
        """Within it the model has the averages; afterwards it is what it was, unless they are kept."""
        state = list(chain(self._model.parameters(), self._model.buffers()))
        before = [tensor.detach().clone() for tensor in state]
        with torch.no_grad():
            for name, average in self._averages.items():
                self._parameters[name].copy_(average)
        try:
            yield
        finally:
            if not keep:
                with torch.no_grad():
                    for tensor, old in zip(state, before, strict=True):
                        tensor.copy_(old)

    def state(self) -> dict[str, Tensor]:
        """The averages by the names of their parameters, not copied."""
        return dict(self._averages)

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Takes averages from a training state.

        Raises:
            CheckpointError: They are not this model's.
        """
        if state.keys() != self._averages.keys() or any(state[n].shape != a.shape for n, a in self._averages.items()):
            raise CheckpointError("the training state's moving averages do not fit the model; start afresh")
        for name, average in self._averages.items():
            average.copy_(state[name])
