"""The ways in which calibration finds the range of an activation; `observers` runs one for each value.

torchao's observers are used where they are right: its moving average, and its histogram, of which only the search
is ours (`range_search.l2_range`). They are imported when first used.
"""

from __future__ import annotations

import importlib
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from edgeqat.errors import InputError, PlanError
from edgeqat.ranks import Ranks
from edgeqat.simulate.float_histogram import FloatHistogram
from edgeqat.simulate.range_search import Range, l2_range, mse_range, percentile_range

__all__ = ["METHODS", "Foreign", "Histogram", "MeanSquaredError", "Method", "MinMax", "MovingAverage", "Percentile"]

LARGEST_PIECE = 2**24
"""torch.histc counts in float32: a bin holds no more than this from one call."""

SHRINK = 24
"""torchao's observers see values times 2**-24: differences, times the number of bins, then stay finite in float32.

The power of two changes no other digit, except of values below 1e-31, which are zero on the finest grid there is.
"""


class Method:
    """One way of finding a range, for one value.

    Attributes:
        alone: Why several processes cannot find one range with it; empty where they can.
        two_passes: Whether several processes need the data twice, the second time on bins they agree on.
        symmetric: Whether the grid will have its zero point in the middle (`affine.activation_qparams`).
    """

    alone = ""
    two_passes = False
    symmetric = False

    def look(self, x: Tensor) -> None:
        """Takes in a batch of finite values."""

    def range(self, low: float, high: float, qmin: int, qmax: int) -> Range:
        """The range found, where the values seen lie in [low, high]."""
        raise NotImplementedError

    def merge(self, ranks: Ranks) -> None:
        """Adds up what all processes have seen, after the last pass."""

    def fix_bins(self, low: float, high: float) -> None:
        """Starts the second pass: all values lie in [low, high]."""


class MinMax(Method):
    """From the smallest value seen to the largest."""

    def range(self, low: float, high: float, qmin: int, qmax: int) -> Range:
        """The extremes."""
        return low, high


class MovingAverage(Method):
    """Averages of the extremes of each batch: torchao's MovingAverageMinMaxObserver.

    Args:
        averaging_constant: How much a new batch counts.
    """

    alone = "it depends on the order of the batches, and processes have none in common"

    def __init__(self, averaging_constant: float = 0.01) -> None:
        self._observer = _torchao().MovingAverageMinMaxObserver(averaging_constant, **_SETTINGS)

    def look(self, x: Tensor) -> None:
        """Averages the extremes of a batch in."""
        self._observer(x * 2.0**-SHRINK)

    def range(self, low: float, high: float, qmin: int, qmax: int) -> Range:
        """The averages."""
        return float(self._observer.min_val) * 2.0**SHRINK, float(self._observer.max_val) * 2.0**SHRINK


class Histogram(Method):
    """torchao's HistogramObserver: equal bins, and a search that clips while the squared error falls.

    Args:
        bins: How many.
    """

    two_passes = True

    def __init__(self, bins: int = 2048) -> None:
        self._observer = _torchao().HistogramObserver(bins, **_SETTINGS)
        self._fixed: Range | None = None

    def look(self, x: Tensor) -> None:
        """Counts a batch."""
        x = x * 2.0**-SHRINK
        if self._fixed is not None:
            x = x.clamp(*self._fixed)  # in a second pass, values may come out otherwise in their last bit
        if x.numel() <= LARGEST_PIECE:
            self._observer(x)
        else:
            for piece in torch.split(x.reshape(-1), LARGEST_PIECE):
                self._observer(piece)

    def range(self, low: float, high: float, qmin: int, qmax: int) -> Range:
        """What the search finds; not `symmetric`, on the grid that torchao would make of it."""
        observer = self._observer
        if float(observer.min_val) == float(observer.max_val) == 0.0:
            return low, high  # so small that nothing is left to search
        # The search cubes distances in float32. Scaled by a power of two they neither overflow nor vanish, and
        # otherwise nothing changes.
        exponent = math.frexp(max(abs(float(observer.min_val)), abs(float(observer.max_val))))[1]
        low_end, high_end = (
            torch.tensor(math.ldexp(float(v), -exponent), dtype=torch.float32)
            for v in (observer.min_val, observer.max_val)
        )
        below, above = l2_range(observer.histogram, low_end, high_end, qmax - qmin + 1)
        below, above = below.clamp(max=0.0), above.clamp(min=0.0)
        if self.symmetric:
            return math.ldexp(float(below), exponent + SHRINK), math.ldexp(float(above), exponent + SHRINK)
        scale = (above - below) / float(qmax - qmin)
        zero_point = int((qmin - torch.round(below / scale)).clamp(qmin, qmax))
        step = math.ldexp(float(scale), exponent + SHRINK)
        return (qmin - zero_point) * step, (qmax - zero_point) * step

    def merge(self, ranks: Ranks) -> None:
        """Adds the counts up."""
        self._observer.histogram.copy_(ranks.total(self._observer.histogram))

    def fix_bins(self, low: float, high: float) -> None:
        """Empties the bins and spreads them over [low, high]."""
        self._fixed = (low * 2.0**-SHRINK, high * 2.0**-SHRINK)
        self._observer.min_val.fill_(self._fixed[0])
        self._observer.max_val.fill_(self._fixed[1])
        self._observer.histogram.zero_()


class _Counted(Method):
    """What is found in a histogram of everything seen."""

    def __init__(self) -> None:
        self._histogram = FloatHistogram()

    def look(self, x: Tensor) -> None:
        """Counts a batch."""
        self._histogram.add(x)

    def merge(self, ranks: Ranks) -> None:
        """Adds the counts up."""
        self._histogram.counts = ranks.total(self._histogram.counts)


class Percentile(_Counted):
    """Leaves out a fixed share of the values at either end (Krishnamoorthi 2018 and Wu et al. 2020 compare it).

    Args:
        percentile: At most 100 - percentile per cent of the values lie below the range, and as many above it.
    """

    def __init__(self, percentile: float = 99.99) -> None:
        super().__init__()
        if not 50.0 < percentile <= 100.0:
            raise PlanError(f"found the percentile {percentile}, wanted one above 50, up to 100")
        self.percentile = percentile

    def range(self, low: float, high: float, qmin: int, qmax: int) -> Range:
        """The two quantiles."""
        return percentile_range(self._histogram.bins(low, high), self.percentile)


class MeanSquaredError(_Counted):
    """The range that minimises the mean squared error of fake quantization (Banner et al. 2019, by search)."""

    def range(self, low: float, high: float, qmin: int, qmax: int) -> Range:
        """The best range for this number of integers."""
        return mse_range(self._histogram.bins(low, high), qmin, qmax, symmetric=self.symmetric)


class Foreign(Method):
    """An observer with torch.ao's protocol: called with tensors, it says scale and zero_point in the end.

    Raises:
        PlanError: The object does not follow the protocol.
    """

    alone = "only the object itself knows how to join what two of them have seen"

    def __init__(self, observer: Any, name: str) -> None:
        # A fake-quantize module would search its range in every batch; the observer inside is what matters.
        self._observer = getattr(observer, "activation_post_process", observer)
        self._name = f"{name}: the observer {type(self._observer).__name__}"
        if not callable(self._observer) or not callable(getattr(self._observer, "calculate_qparams", None)):
            raise PlanError(f"{self._name} has no call or no calculate_qparams(), wanted torch.ao's observer protocol")

    def look(self, x: Tensor) -> None:
        """Shows it a batch."""
        try:
            self._observer(x)
        except Exception as error:
            raise PlanError(f"{self._name} failed on a batch: {_one_line(error)}") from error

    def range(self, low: float, high: float, qmin: int, qmax: int) -> Range:
        """What its scale, zero_point, quant_min and quant_max imply."""
        try:
            scale, zero_point = (torch.as_tensor(v) for v in self._observer.calculate_qparams())
            if scale.numel() != 1 or zero_point.numel() != 1:
                raise InputError(f"found {scale.numel()} scales, wanted one: activations have per-tensor grids")
            step, zero = float(scale), float(zero_point)
            bounds = [getattr(self._observer, key, None) for key in ("quant_min", "quant_max")]
            first, last = (float(d if b is None else b) for b, d in zip(bounds, (qmin, qmax), strict=True))
        except Exception as error:
            raise PlanError(f"{self._name} gave no scale and zero_point: {_one_line(error)}") from error
        ends = ((first - zero) * step, (last - zero) * step)
        if self.symmetric and abs(ends[0] + ends[1]) <= step:  # its grid is symmetric, and half a step longer below
            ends = (-(last - first) / 2 * step, (last - first) / 2 * step)
        if not (0.0 < step < math.inf) or not ends[0] < ends[1] or not all(map(math.isfinite, ends)):
            raise PlanError(
                f"{self._name} gave scale {step:g} and zero_point {zero:g} for the integers {first:g} .. {last:g}, "
                "wanted a finite positive scale and a finite range"
            )
        return ends


METHODS: Mapping[str, Callable[..., Method]] = {
    "minmax": MinMax,
    "moving_average": MovingAverage,
    "histogram": Histogram,
    "percentile": Percentile,
    "mse": MeanSquaredError,
}

_SETTINGS = {"dtype": torch.quint8, "qscheme": torch.per_tensor_affine, "quant_min": 0, "quant_max": 255}


def _torchao() -> Any:
    # torchao reports at import the GPU kernels that it cannot load on this machine; calibration uses none.
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        return importlib.import_module("torchao.quantization.pt2e.observer")
    finally:
        logging.disable(disabled)


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
