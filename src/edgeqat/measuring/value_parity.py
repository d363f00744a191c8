"""How the integers of one value compare with the reference's: a histogram of errors in quantization steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["ValueParity", "ValueTally"]

WIDEST = 255
"""Steps that two 8-bit integers can be apart."""


@dataclass(frozen=True)
class ValueParity:
    """One value inside a network, over all samples.

    Attributes:
        name: Its name in the program.
        op: Name of the op that makes it.
        histogram: How many integers are off by how many steps, found less expected; 0 counts those that are equal.
    """

    name: str
    op: str
    histogram: Mapping[int, int]

    @property
    def n(self) -> int:
        """Integers compared."""
        return sum(self.histogram.values())

    @property
    def bit_identical(self) -> float:
        """Share of them that are equal; 1 of none."""
        return self.histogram.get(0, 0) / self.n if self.n else 1.0

    @property
    def max_error_steps(self) -> float:
        """The largest difference, in steps."""
        return float(max((abs(steps) for steps in self.histogram), default=0))


class ValueTally:
    """Adds up the comparison of inner values, batch by batch.

    Args:
        makers: The name of the op that makes each value, by value, in program order.
    """

    def __init__(self, makers: Mapping[str, str]) -> None:
        self._makers = makers
        self._counts: dict[str, Counter[int]] = {name: Counter() for name in makers}

    def add(self, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
        """Counts a batch of integers, held in any dtype."""
        for name, integers in expected.items():
            errors = found[name].to(torch.float32) - integers
            if not bool(errors.any()):
                self._counts[name][0] += errors.numel()
                continue
            counts = torch.bincount(errors.int().flatten() + WIDEST).tolist()
            self._counts[name].update({i - WIDEST: count for i, count in enumerate(counts) if count})

    def values(self) -> tuple[ValueParity, ...]:
        """Every value that was seen, in program order."""
        return tuple(
            ValueParity(name, self._makers[name], dict(sorted(counts.items())))
            for name, counts in self._counts.items()
            if counts
        )
