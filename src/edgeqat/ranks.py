"""The processes of torch.distributed that work on one model together."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from edgeqat.errors import EdgeqatError, LostProcessError

__all__ = ["ALONE", "Ranks", "lost"]

T = TypeVar("T")


class Ranks:
    """The default process group; a single process where torch.distributed is not initialised.

    All processes must call the same methods in the same order.

    Args:
        alone: Whether this process works by itself, whatever group there is.
        patience: How long they wait for one another; None for as long as the group was made with. All processes must
            make such ranks together.

    Attributes:
        size: Number of processes.
        rank: Of this one, 0 to size - 1.
    """

    def __init__(self, alone: bool = False, patience: timedelta | None = None) -> None:
        together = not alone and dist.is_available() and dist.is_initialized()
        # NCCL waits by turning a processor.
        self._group = dist.new_group(timeout=patience, backend="gloo") if together and patience is not None else None
        self.size, self.rank = (dist.get_world_size(), dist.get_rank()) if together else (1, 0)

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and tells the user."""
        return self.rank == 0

    def largest(self, x: Tensor) -> Tensor:
        """The elementwise maximum over all processes, of any shape."""
        return self._reduce(x, dist.ReduceOp.MAX) if self.size > 1 else x

    def total(self, x: Tensor) -> Tensor:
        """The sum over all processes. Counts are summed exactly: in int64 or float64."""
        if self.size == 1:
            return x
        wide = x if x.dtype == torch.int64 else x.double()
        return self._reduce(wide, dist.ReduceOp.SUM).to(x.dtype)

    def of_first(self, value: T) -> T:
        """What the first process has; the argument of the others is not looked at."""
        if self.size == 1:
            return value
        told = [value]
        with _telling_of_loss():
            dist.broadcast_object_list(told, src=0, group=self._group, device=self._device())
        return told[0]

    def of_each(self, value: T) -> list[T]:
        """What each process has, in their order."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        with _telling_of_loss():
            dist.all_gather_object(found, value, group=self._group)
        return found

    def copy_first(self, tensors: list[Tensor]) -> None:
        """Gives tensors the bits that they have in the first process, in place."""
        if self.size == 1:
            return
        for tensor in tensors:
            shared = tensor.detach().to(self._device()).contiguous()
            with _telling_of_loss():
                dist.broadcast(shared, src=0, group=self._group)
            with torch.no_grad():
                tensor.copy_(shared)

    @contextmanager
    def together(self) -> Iterator[None]:
        """What fails in one process inside it fails in all, instead of leaving the others to wait for it.

        Raises:
            EdgeqatError: The error of the first process that failed, of its own class.
        """
        try:
            yield
        except LostProcessError:  # there is nobody left to tell
            raise
        except Exception as error:
            self._first_failure(error)
            raise
        failure = self._first_failure(None)
        if failure is not None:
            raise failure

    @contextmanager
    def alike(self) -> Iterator[None]:
        """What fails inside it fails in every process for the same reason: the first one tells of it."""
        try:
            yield
        except EdgeqatError as error:
            error.told = not self.first
            raise

    def _first_failure(self, own: Exception | None) -> Exception | None:
        """The error of the first process that has one; `own` is this one's."""
        if self.size == 1 or not int(self.largest(torch.tensor(int(own is not None)))):
            return own
        failure = next(error for error in self.of_each(_portable(own)) if error is not None)
        for error in (failure, own):
            if isinstance(error, EdgeqatError):
                error.told = not self.first
        return failure

    def _reduce(self, x: Tensor, op: dist.ReduceOp.RedOpType) -> Tensor:
        shared = x.detach().clone().to(self._device())
        with _telling_of_loss():
            dist.all_reduce(shared, op, group=self._group)
        return shared.to(x.device)

    def _device(self) -> torch.device:
        # NCCL moves GPU memory alone.
        return torch.device("cuda" if dist.get_backend(self._group) == "nccl" else "cpu")


ALONE = Ranks(alone=True)
"""A process by itself."""


def _portable(error: Exception | None) -> Exception | None:
    """An error as it can be sent to another process: classes of others, and what they hold, may not be known there."""
    if error is None or isinstance(error, EdgeqatError):
        return error
    return EdgeqatError(f"{type(error).__name__}: {error}")


@contextmanager
def _telling_of_loss() -> Iterator[None]:
    """torch.distributed raises RuntimeError, and subclasses of it, where another process is gone or silent."""
    try:
        yield
    except RuntimeError as error:
        raise lost(error) from error


def lost(error: RuntimeError) -> LostProcessError:
    """What it means that torch.distributed fails."""
    first = (str(error).splitlines() or [type(error).__name__])[0]
    reason = re.sub(r"^\[[^\]]*\] ", "", first).split(". ")[0]  # without a place in torch's sources, and its advice
    found = LostProcessError("")
    found.gone = "timed out" not in reason.lower()
    what = "is gone" if found.gone else "has not answered in time (compute.timeout)"
    found.args = (
        f"another process of this run {what}: {reason}; "
        "the same command with --resume goes on from the last checkpoint",
    )
    return found
