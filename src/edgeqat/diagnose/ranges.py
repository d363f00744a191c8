"""What a value or weight looks like on its grid: range, outliers, what is clipped, what rounding costs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from edgeqat.simulate.fake_quant import ActivationQuantizer
from edgeqat.simulate.observers import Seen
from edgeqat.simulate.parameter_quantizers import WeightQuantizer

__all__ = ["RangeTally", "Ranges", "decibels", "weight_ranges"]


@dataclass(frozen=True)
class Ranges:
    """A value or weight on its grid. Values are those of the float model.

    Attributes:
        low: Smallest.
        high: Largest.
        grid_low: The real number of the smallest integer; of the channel with the widest grid.
        grid_high: That of the largest.
        scale: The step; the largest of several.
        clipped: Share of elements that are beyond the grid's ends by more than the half step that rounding costs.
        outlier_ratio: Largest magnitude by the 99.9 % quantile of the nonzero magnitudes; None below ten of them.
        channel_ratio: Largest magnitude by the median of the channels' largest magnitudes, along dimension 1 of a
            value or 0 of a weight; None where each channel has a scale of its own, or there is but one channel.
        sqnr: Energy by the energy of what quantization changes, in dB, of the value itself; infinite for no change.
    """

    low: float
    high: float
    grid_low: float
    grid_high: float
    scale: float
    clipped: float
    outlier_ratio: float | None
    channel_ratio: float | None
    sqnr: float


class RangeTally:
    """Looks at a value in the float model, batch by batch.

    Args:
        quantizer: Whose grid it would be on.
    """

    def __init__(self, quantizer: ActivationQuantizer) -> None:
        self._quantizer, self._seen = quantizer, Seen()
        self._energy = self._error = 0.0
        self._clipped = self._count = 0
        self._channels: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """Takes the value of a batch, [N, ...], behind its activation function."""
        x = x.detach().float()
        self._seen.add(x)
        self._error += float((self._quantizer.quantize(x) - x).double().square().sum())  # an operand's grid follows it
        low, high, half = self._ends()
        self._clipped += int(((x < low - half) | (x > high + half)).sum())
        self._count += x.numel()
        self._energy += float(x.double().square().sum())
        if x.ndim > 1:
            self._widen(_largest(x, 1))

    def to_dict(self) -> dict[str, Any]:
        """What was seen of one batch, JSON-ready and exact: a sum of floats may be infinite."""
        found = {"energy": self._energy.hex(), "error": self._error.hex(), "clipped": self._clipped, "n": self._count}
        channels = None if self._channels is None else [largest.hex() for largest in self._channels.tolist()]
        return {**found, "channels": channels, "seen": self._seen.to_dict()}

    def join(self, batch: Mapping[str, Any]) -> None:
        """Takes a batch that another tally has looked at, as its `to_dict` tells it: with the bits of `add`."""
        self._seen.join(batch["seen"])
        self._error += float.fromhex(batch["error"])
        self._energy += float.fromhex(batch["energy"])
        self._clipped, self._count = self._clipped + batch["clipped"], self._count + batch["n"]
        if batch["channels"] is not None:
            self._widen(torch.tensor([float.fromhex(largest) for largest in batch["channels"]]))

    def _widen(self, largest: Tensor) -> None:
        self._channels = largest if self._channels is None else torch.maximum(self._channels, largest)

    def ranges(self) -> Ranges | None:
        """What was seen; None if nothing."""
        if not self._seen.count:
            return None
        low, high, half = self._ends()
        return Ranges(
            low=self._seen.low,
            high=self._seen.high,
            grid_low=low,
            grid_high=high,
            scale=2 * half,
            clipped=self._clipped / self._count,
            outlier_ratio=_outlier_ratio(self._seen),
            channel_ratio=None if self._channels is None else _channel_ratio(self._channels),
            sqnr=decibels(self._energy, self._error),
        )

    def _ends(self) -> tuple[float, float, float]:
        """The ends of the grid, and half a step."""
        quantizer = self._quantizer
        scale, zero_point = (float(t) for t in quantizer.grid())
        return (quantizer.lowest - zero_point) * scale, (quantizer.highest - zero_point) * scale, scale / 2


def weight_ranges(quantizer: WeightQuantizer, weight: Tensor) -> Ranges:
    """A weight on its grid."""
    weight = weight.detach().float()
    scale, axis, seen = quantizer.scale_of(weight), quantizer.axis, Seen()
    step = scale if axis is None else scale.reshape([-1 if d == axis else 1 for d in range(weight.ndim)])
    end = quantizer.qmax * float(scale.max())
    seen.add(weight)
    on_grid = torch.clamp(torch.round(weight / step), -quantizer.qmax, quantizer.qmax) * step
    return Ranges(
        low=seen.low,
        high=seen.high,
        grid_low=-end,
        grid_high=end,
        scale=float(scale.max()),
        clipped=float((weight.abs() > (quantizer.qmax + 0.5) * step).double().mean()),
        outlier_ratio=_outlier_ratio(seen),
        channel_ratio=_channel_ratio(_largest(weight, 0)) if axis is None else None,
        sqnr=decibels(float(weight.double().square().sum()), float((on_grid - weight).double().square().sum())),
    )


def _largest(x: Tensor, dim: int) -> Tensor:
    """The largest magnitude along all other dimensions, [C]."""
    return x.abs().amax([d for d in range(x.ndim) if d != dim])


def _channel_ratio(channels: Tensor) -> float | None:
    median = float(channels.quantile(0.5))
    return float(channels.max()) / median if len(channels) > 1 and median > 0 else None


def _outlier_ratio(seen: Seen) -> float | None:
    found = seen.magnitudes()
    # The quantile is the upper edge of a bin that the largest value may lie in too.
    return None if found is None else max(1.0, found[0] / found[1])


def decibels(energy: float, error: float) -> float:
    """Energy by the energy of the error, in dB; infinite where there is no error, minus infinity where only that."""
    if error == 0.0:
        return math.inf
    return 10 * math.log10(energy / error) if energy > 0.0 else -math.inf
