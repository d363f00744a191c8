"""What one process of several gets of all batches, and how it asks a split for its samples."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from edgeqat.errors import DataError

__all__ = ["ALL", "Request", "Share"]


@dataclass(frozen=True)
class Share:
    """What process number `rank` of `ranks` gets.

    Attributes:
        rank: 0 .. ranks - 1.
        ranks: How many processes there are.
        within: Whether it is a part of every batch, as in training: of n samples those from n * rank // ranks up to
            n * (rank + 1) // ranks, and where these are none, the first sample, so that every process takes every
            step. Otherwise, as in evaluation, whole batches: number rank, rank + ranks, rank + 2 * ranks and so on,
            nothing twice and nothing left out, perhaps none at all.

    Raises:
        DataError: rank or ranks is out of its range.
    """

    rank: int = 0
    ranks: int = 1
    within: bool = True

    def __post_init__(self) -> None:
        if self.ranks < 1 or not 0 <= self.rank < self.ranks:
            raise DataError(f"found a share of rank {self.rank} among {self.ranks}, wanted 0 <= rank < ranks")

    def of_batch(self, n: int) -> slice:
        """Positions of its samples in a batch of n that it takes part in; n is at least 1."""
        if not self.within:
            return slice(0, n)
        own = slice(n * self.rank // self.ranks, n * (self.rank + 1) // self.ranks)
        return own if own.start < own.stop else slice(0, 1)

    def weight(self, n: int) -> float:
        """What the mean over its samples counts for, so that the mean over ranks is the mean over the batch of n."""
        if not self.within:
            return 1.0
        own = n * (self.rank + 1) // self.ranks - n * self.rank // self.ranks
        return own * self.ranks / n

    def of_batches(self, n: int) -> range:
        """Which of n batches it takes part in."""
        return range(n) if self.within else range(self.rank, n, self.ranks)


ALL = Share()
"""What a process gets that is the only one."""


@dataclass(frozen=True, eq=False)
class Request:
    """A batch as it is asked for.

    Attributes:
        chosen: Indices of all samples of the batch, int64 [B].
        own: Which positions of them are asked for.
        crops: For each sample of the batch what a crop of its encoded image is made from, [B, ...], or None.
    """

    chosen: Tensor
    own: slice
    crops: Tensor | None = None
