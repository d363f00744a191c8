"""What training runs on: this process alone, or several and other devices through Lightning Fabric."""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from edgeqat.errors import DataError, EdgeqatError, ModelError
from edgeqat.ranks import ALONE, Ranks, lost
from edgeqat.train.batch_norm import average_batch_norm, running_statistics

if TYPE_CHECKING:
    from lightning_fabric import Fabric

__all__ = ["Engine"]

T = TypeVar("T")

LOST = re.compile(r"gloo[/:]|^NCCL|ncclRemoteError|Connection (closed|reset) by peer|Timed out waiting \d+ms")
"""What torch.distributed says where another process is gone or silent, in RuntimeErrors of no class of its own."""


class Engine:
    """A model and its optimizer, set up for training.

    Precision is not Fabric's part: its bf16-mixed rounds inputs to bfloat16 before the model sees them, and they would
    lose the integers that the device gets.

    Args:
        fabric: Launched; None for this process by itself, on whatever device the model is.
        model: Moved to Fabric's device, in place.

    Attributes:
        ranks: The processes that train.
        forward: The model to call in a training step, with the model's own arguments.
    """

    def __init__(self, fabric: Fabric | None, model: nn.Module) -> None:
        self._fabric, self._model = fabric, model
        self.ranks = Ranks() if fabric is not None and fabric.world_size > 1 else ALONE
        with self.ranks.together():
            self._wrapped = None if fabric is None else fabric.setup_module(model)
        self.forward: nn.Module = model if self._wrapped is None else self._wrapped

    def seed(self, seed: int) -> None:
        """Seeds what is random in the model; each process has numbers of its own."""
        rank = self.ranks.rank
        torch.manual_seed(seed if rank == 0 else _mixed(seed, rank))

    def to_device(self, data: T) -> T:
        """Tensors of a structure on the device that trains."""
        return data if self._fabric is None else self._fabric.to_device(data)

    def to_host(self, data: T) -> T:
        """Tensors of a structure in the memory of the CPU, where targets of an evaluation are."""
        if self._fabric is None or self._fabric.device.type == "cpu":
            return data
        moved: T = pytree.tree_map_only(Tensor, lambda t: t.cpu(), data)
        return moved

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of a loss; those of the last part of a step are averaged over processes."""
        if self._fabric is None:
            loss.backward()  # type: ignore[no-untyped-call]
        else:
            self._fabric.backward(loss)

    def apart(self) -> contextlib.AbstractContextManager[Any]:
        """Around the passes of a part of a step that is not its last: gradients stay in their process."""
        if self._fabric is None or self._wrapped is None or self.ranks.size == 1:
            return contextlib.nullcontext()
        return self._fabric.no_backward_sync(self._wrapped)

    def meaning_of(self, error: RuntimeError) -> EdgeqatError | None:
        """What an error of a pass over several processes means; None where it is none of those."""
        message = str(error)
        if self.ranks.size > 1 and "finished reduction in the prior iteration" in message:
            return ModelError(
                "a parameter of the model has no part in the loss, which several processes cannot wait for; "
                "freeze it with requires_grad_(False), or train in one process"
            )
        if self.ranks.size > 1 and (isinstance(error, dist.DistError) or LOST.search(message)):
            return lost(error)
        return None

    def each(self, batches: Iterator[T], n: int) -> Iterator[T]:
        """The batches, on the device; where one of several processes cannot get its n, all of them fail."""
        try:
            for index in range(n) if self.ranks.size > 1 else itertools.count():
                with self.ranks.together():
                    batch = next(batches, None)
                    if batch is None and self.ranks.size > 1:
                        raise DataError(f"found {index} training batches, wanted the {n} that their length says")
                if batch is None:
                    return
                yield self.to_device(batch)
        finally:
            if hasattr(batches, "close"):  # a loader's processes end with their generator
                batches.close()

    def check_equal(self, steps: int) -> None:
        """Checks that all processes have as many steps.

        Raises:
            DataError: They have not; one would wait for the others for ever.
        """
        found = self.ranks.of_each(steps)
        if len(set(found)) > 1:
            raise DataError(f"the processes have {', '.join(map(str, found))} training batches, wanted equally many")

    def settle(self) -> None:
        """Ends an epoch: running statistics of batch norms, which each process has of its own, are averaged.

        Whatever else moves in buffers is taken from the first process.
        """
        if self.ranks.size > 1:
            average_batch_norm(self._model, self.ranks)
            norms = {id(buffer) for buffer in running_statistics(self._model).values()}
            self.ranks.copy_first([b for b in self._model.buffers() if b.is_floating_point() and id(b) not in norms])


def _mixed(seed: int, rank: int) -> int:
    return int(np.random.SeedSequence(seed, spawn_key=(rank,)).generate_state(1, np.uint64)[0] >> np.uint64(1))
