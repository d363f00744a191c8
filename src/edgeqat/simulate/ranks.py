"""The processes of torch.distributed that calibrate one model together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from edgeqat.errors import DataError

__all__ = ["Ranks"]


class Ranks:
    """The default process group; a single process where torch.distributed is not initialised.

    Attributes:
        size: Number of processes.
    """

    def __init__(self) -> None:
        self.size = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1

    def largest(self, x: Tensor) -> Tensor:
        """The elementwise maximum over all processes, of any shape."""
        return self._reduce(x, dist.ReduceOp.MAX) if self.size > 1 else x

    def total(self, x: Tensor) -> Tensor:
        """The sum over all processes. Counts are summed exactly: in int64 or float64."""
        if self.size == 1:
            return x
        wide = x if x.dtype == torch.int64 else x.double()
        return self._reduce(wide, dist.ReduceOp.SUM).to(x.dtype)

    @contextmanager
    def together(self) -> Iterator[None]:
        """What fails in one process inside it fails in all, instead of leaving the others to wait for it.

        Raises:
            DataError: Another process failed.
        """
        try:
            yield
        except Exception:
            self.largest(torch.tensor(1))
            raise
        if self.size > 1 and int(self.largest(torch.tensor(0))):
            raise DataError("calibration failed in another process; the error it raised there says why")

    def _reduce(self, x: Tensor, op: dist.ReduceOp.RedOpType) -> Tensor:
        # NCCL moves GPU memory alone.
        shared = x.detach().clone().to("cuda" if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(shared, op)
        return shared.to(x.device)
