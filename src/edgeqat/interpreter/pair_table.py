"""Sums and products of two values by table: both have at most 256 integers, so their result has at most 65,536.

The table is made by the very arithmetic whose results it holds, and looking up costs a fraction of the float64 that
exact sums take.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from edgeqat.program import Grid

__all__ = ["PairTables"]

Combine = Callable[[Tensor, Grid, Tensor, Grid, Grid], Tensor]
"""An arithmetic's addition or product."""

WORTH_FROM = 4
"""A table pays from so many times as many elements as it has entries."""


class PairTables:
    """The tables of one program's additions and products, each made when it is first worth it."""

    def __init__(self) -> None:
        self._tables: dict[str, Tensor] = {}

    def combine(
        self, op: str, combine: Combine, block: int, a: Tensor, a_grid: Grid, b: Tensor, b_grid: Grid, grid: Grid
    ) -> Tensor:
        """What `combine` makes of a and b, by table where that is cheaper and the same.

        Args:
            op: Name of the op.
            combine: The arithmetic's addition or product.
            block: Elements that it computes together; those left over may come out differently.
            a: Integers of `a_grid`, in float32.
            a_grid: Grid of a.
            b: Integers of `b_grid`, in float32.
            b_grid: Grid of b.
            grid: Grid of the result.
        """
        n_a, n_b = a_grid.qmax + 1, b_grid.qmax + 1
        size = n_a * n_b
        # Operands that are repeated may have another formula, and what fills no block has.
        if a.shape != b.shape or a.numel() % block or size % block or a.numel() < WORTH_FROM * size:
            return combine(a, a_grid, b, b_grid, grid)
        if op not in self._tables:
            every_a = torch.arange(n_a, dtype=torch.float32).repeat_interleave(n_b)
            every_b = torch.arange(n_b, dtype=torch.float32).repeat(n_a)
            self._tables[op] = combine(every_a, a_grid, every_b, b_grid, grid)
        return torch.take(self._tables[op], torch.add(b, a, alpha=n_b).to(torch.int64))
