"""A streaming histogram whose bins never move: float32 values counted by the leading bits of their representation.

A bin holds the values of one sign, one exponent and the same leading bits of the mantissa, so its width is a fixed
share of its values. Every finite float32 has its bin before any data is seen: nothing is ever rescaled, merged or
interpolated, an outlier costs no resolution elsewhere, and the counts of two histograms add up exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Bins", "FloatHistogram"]

_EXPONENT_BITS, _MANTISSA_BITS = 8, 23


@dataclass(frozen=True, eq=False)
class Bins:
    """The bins of a histogram that hold something, in ascending order; they do not overlap.

    Attributes:
        low: Lower edges, float64 [B].
        high: Upper edges, float64 [B].
        count: Values in each, float64 [B].
    """

    low: Tensor
    high: Tensor
    count: Tensor


class FloatHistogram:
    """Counts float32 values.

    Attributes:
        counts: int64, [2 * half]: negative values by ascending magnitude, then the others by ascending magnitude.
        half: Bins of one sign.
    """

    def __init__(self, mantissa_bits: int = 8) -> None:
        self._shift = _MANTISSA_BITS - mantissa_bits
        self.half = 1 << (_EXPONENT_BITS + mantissa_bits)
        self.counts = torch.zeros(2 * self.half, dtype=torch.int64)

    def add(self, x: Tensor) -> None:
        """Counts the elements of a float32 tensor of any shape; all must be finite."""
        # As int32 a float of negative sign is negative, and otherwise ordered by magnitude.
        keys = (x.contiguous().reshape(-1).view(torch.int32) >> self._shift) + self.half
        self.counts += torch.bincount(keys, minlength=2 * self.half).cpu()

    def magnitudes(self) -> Tensor:
        """Counts by magnitude alone, int64 [half]; the first bin is that of zero."""
        return self.counts[: self.half] + self.counts[self.half :]

    def magnitude(self, index: int) -> float:
        """The lower edge of a bin of `magnitudes`."""
        return float(self._edges(torch.tensor([index])))

    def bins(self, low: float, high: float) -> Bins:
        """What was counted, the outer edges drawn in to the extremes [low, high] that are known exactly.

        The bin of zero has no width: magnitudes too small for its neighbour count as zero.
        """
        keys = self.counts.nonzero().flatten()
        sign = torch.where(keys < self.half, -1.0, 1.0).double()
        index = keys % self.half
        near, far = (sign * self._edges(i) for i in (index, index + (index > 0)))
        order = torch.minimum(near, far).argsort(stable=True)
        lows, highs = (edge[order].clamp(low, high) for edge in (torch.minimum(near, far), torch.maximum(near, far)))
        return Bins(lows, highs, self.counts[keys][order].double())

    def _edges(self, keys: Tensor) -> Tensor:
        """Magnitudes at which bins begin, in float64; the end of the last one is infinity."""
        return (keys << self._shift).to(torch.int32).view(torch.float32).double()
