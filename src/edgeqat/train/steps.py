"""One training step: the loss of a batch, in parts and over processes, and the step that its gradients ask for."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from edgeqat.errors import InputError
from edgeqat.signature import Batch, call_of
from edgeqat.train.aids import AidsAtWork
from edgeqat.train.engine import Engine
from edgeqat.train.finite import Place, explain_gradient, explain_loss
from edgeqat.train.losses import Loss
from edgeqat.train.precision import computing_in, in_float32
from edgeqat.train.state import Settings

__all__ = ["Steps"]


class Part(NamedTuple):
    """Some samples of a batch, and their share of its number."""

    inputs: Batch
    targets: Any
    share: float


class Steps:
    """Takes the steps of one training.

    Args:
        model: As `fit` got it.
        optimizer: Of its parameters.
        criterion: The loss.
        settings: Of the training.
        work: Aids at work.
        engine: What it runs on.
        accumulate: Parts that a batch is taken in; gradients are those of the whole, but for batch norms that are not
            folded, which see the parts.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        criterion: Loss,
        settings: Settings,
        work: AidsAtWork,
        engine: Engine,
        accumulate: int,
    ) -> None:
        self._model, self._optimizer, self._criterion = model, optimizer, criterion
        self._settings, self._work, self._engine, self._accumulate = settings, work, engine, accumulate

    def take(self, inputs: Batch, targets: Any, weight: float, known: frozenset[str], place: Place) -> float:
        """One step; it is not taken where the loss or a gradient is not finite, in any process.

        Args:
            inputs: This process's share of a batch.
            targets: Of these inputs.
            weight: Of the share: its samples by the mean share's.
            known: What holds NaN or infinity since before training.
            place: The step.

        Returns:
            The loss, its mean over the whole batch.

        Raises:
            InputError: Something is not finite; the cause is named.
        """
        rng = torch.get_rng_state()
        self._optimizer.zero_grad(set_to_none=True)
        try:
            own = self._passes(inputs, targets, weight, place)
        except RuntimeError as error:
            meaning = self._engine.meaning_of(error)
            if meaning is None:
                raise
            with self._engine.ranks.alike():
                raise meaning from error
        norm = torch.nn.utils.get_total_norm([p.grad for p in self._model.parameters() if p.grad is not None])
        mean, bad_losses, bad_gradients = self._agreed(own * weight, not math.isfinite(own), float(norm))
        if bad_losses or bad_gradients:
            with self._engine.ranks.together():
                # A gradient of this process is not finite where the loss of another one is not.
                if not math.isfinite(own):
                    with computing_in(self._settings.precision, self._model):
                        raise explain_loss(self._model, inputs, targets, own, rng, known, place)
                if not bad_losses:
                    raise explain_gradient(self._model, float(norm), place)
        if self._settings.max_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self._model.parameters(), self._settings.max_grad_norm, norm)
        self._optimizer.step()
        return mean

    def _passes(self, inputs: Batch, targets: Any, weight: float, place: Place) -> float:
        """Forward and backward; the mean loss of this process's share."""
        means: list[float] = []
        # The last backward pass averages gradients over processes: none may be left waiting there.
        with self._engine.ranks.together():
            *parts, last = _parts(inputs, targets, self._accumulate)
            for part in parts:
                with self._engine.apart():
                    self._engine.backward(self._forward(part, weight, place, means))
            loss = self._forward(last, weight, place, means)
        self._engine.backward(loss)
        return sum(means)

    def _forward(self, part: Part, weight: float, place: Place, means: list[float]) -> Tensor:
        """What a part adds to the loss whose gradient is taken; appends what it adds to the mean."""
        (args, kwargs), step = call_of(part.inputs), place.epoch * self._settings.steps + place.step
        with computing_in(self._settings.precision, self._model):
            outputs = in_float32(self._engine.forward(*args, **kwargs))
            task = self._criterion(outputs, part.targets)
            loss = self._work.loss(task, part.inputs, outputs, part.targets, step)
        means.append(part.share * float(loss.detach()))
        factor = part.share * weight
        return loss if factor == 1.0 else loss * factor

    def _agreed(self, loss: float, bad: bool, norm: float) -> tuple[float, int, int]:
        """The mean loss over processes; in how many of them the loss, and the norm of gradients, is not finite."""
        ranks = self._engine.ranks
        if ranks.size == 1:
            return loss, int(bad), int(not math.isfinite(norm))
        found = ranks.total(torch.tensor([loss, bad, not math.isfinite(norm)], dtype=torch.float64)).tolist()
        return found[0] / ranks.size, int(found[1]), int(found[2])


def _parts(inputs: Batch, targets: Any, wanted: int) -> Iterator[Part]:
    """A batch in parts of nearly equal size, none of them empty."""
    n = next((len(leaf) for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.dim() > 0), 1)
    if wanted == 1 or n == 1:
        yield Part(inputs, targets, 1.0)
        return
    leaves = [leaf for leaf in pytree.tree_leaves((inputs, targets)) if isinstance(leaf, Tensor) and leaf.dim() > 0]
    odd = {len(leaf) for leaf in leaves} - {n}
    if odd:
        raise InputError(
            f"found a tensor of length {odd.pop()} in a batch of {n} samples, which accumulate cannot cut into parts; "
            "set it to 1"
        )
    for part in range(min(wanted, n)):
        cut = slice(n * part // min(wanted, n), n * (part + 1) // min(wanted, n))
        own_inputs, own_targets = pytree.tree_map_only(Tensor, operator.itemgetter(cut), (inputs, targets))
        yield Part(own_inputs, own_targets, (cut.stop - cut.start) / n)
