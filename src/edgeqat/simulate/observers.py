"""Observers: what calibration looks at a value with. They keep the extremes, find the range and warn of bad data."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from edgeqat.errors import CalibrationWarning, EdgeqatError, PhaseError, PlanError
from edgeqat.ranks import Ranks
from edgeqat.simulate.float_histogram import FloatHistogram
from edgeqat.simulate.range_methods import METHODS, Foreign, Method

__all__ = ["OUTLIER_RATIO", "Observer", "make_observer", "observed_range"]

OUTLIER_RATIO = 1000.0
"""A value has an outlier where its largest magnitude is more than this times the 99.9 % quantile of the others."""

SAMPLE = 2**17
"""Values of a batch that the quantile of magnitudes is taken from; the extremes are those of all values."""


class Seen:
    """What any observer must know of the values it has seen.

    Attributes:
        low: Smallest finite value; infinity while there is none.
        high: Largest finite value; minus infinity while there is none.
        count: Number of finite values.
        nans: Whether a batch held NaN.
        infinities: Whether a batch held infinite values.
    """

    def __init__(self) -> None:
        self.low, self.high, self.count = math.inf, -math.inf, 0
        self.nans = self.infinities = False
        self._sample = FloatHistogram(mantissa_bits=4)

    def add(self, x: Tensor) -> Tensor | None:
        """Takes a float32 batch in; returns its finite values, None where there are none or a NaN is among them."""
        if x.numel() == 0:
            return None
        low, high = (float(v) for v in torch.aminmax(x))
        if math.isnan(low):
            self.nans = True
            return None
        if math.isinf(low) or math.isinf(high):
            self.infinities = True
            finite = x[x.isfinite()]
            return self.add(finite)
        self.low, self.high, self.count = min(self.low, low), max(self.high, high), self.count + x.numel()
        self._sample.add(x.reshape(-1)[:: _stride(x.numel())])
        return x

    def merge(self, ranks: Ranks) -> None:
        """Joins what all processes have seen."""
        found = torch.tensor([-self.low, self.high, float(self.nans), float(self.infinities)], dtype=torch.float64)
        low, self.high, nans, infinities = ranks.largest(found).tolist()
        self.low, self.nans, self.infinities = -low, bool(nans), bool(infinities)
        self.count = int(ranks.total(torch.tensor(self.count)))
        self._sample.counts = ranks.total(self._sample.counts)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, and exact."""
        bins = self._sample.counts.nonzero().flatten()
        counts = self._sample.counts[bins].tolist()
        found = {"low": self.low.hex(), "high": self.high.hex(), "count": self.count, "nans": self.nans}
        return {**found, "infinities": self.infinities, "bins": bins.tolist(), "counts": counts}

    def join(self, other: Mapping[str, Any]) -> None:
        """Joins what another one has seen, as its `to_dict` tells it."""
        self.low = min(self.low, float.fromhex(other["low"]))
        self.high = max(self.high, float.fromhex(other["high"]))
        self.count += other["count"]
        self.nans, self.infinities = self.nans or other["nans"], self.infinities or other["infinities"]
        self._sample.counts[torch.tensor(other["bins"], dtype=torch.int64)] += torch.tensor(other["counts"])

    def outlier(self) -> tuple[float, float] | None:
        """What `magnitudes` gives where the first is an outlier, else None."""
        found = self.magnitudes()
        return found if found is not None and found[0] > OUTLIER_RATIO * found[1] else None

    def magnitudes(self) -> tuple[float, float] | None:
        """(largest magnitude, the 99.9 % quantile of magnitudes); None below ten nonzero values.

        Zeros do not count: most outputs of a ReLU may be zero. The largest value itself is never the quantile,
        however few there are.
        """
        counts = self._sample.magnitudes()[1:]
        total = int(counts.sum())
        if total < 10:
            return None
        rank = min(math.ceil(0.999 * total), total - 1)
        index = int(torch.searchsorted(counts.cumsum(0), rank))
        typical = self._sample.magnitude(index + 2)  # the upper edge; the first bin was left out
        return max(-self.low, self.high), typical


def _stride(n: int) -> int:
    """A step through n elements that takes about SAMPLE of them, in no rhythm with any of the dimensions."""
    step = max(1, n // SAMPLE)
    while math.gcd(step, n) != 1:
        step += 1
    return step


class Observer:
    """Looks at one value in calibration.

    Attributes:
        seen: Extremes and counts.
        method: What finds the range.
        which_pass: "only" in a single process; across several "first", or "second" once the bins are fixed.
    """

    def __init__(self, method: Method) -> None:
        self.seen, self.method = Seen(), method
        self.which_pass: Literal["only", "first", "second"] = "only"

    def __call__(self, x: Tensor) -> Tensor:
        """Looks at a batch, and returns it as it is."""
        values = x.detach().to(torch.float32)
        if self.which_pass == "second":
            if self.method.two_passes:
                self.method.look(values[values.isfinite()])
            return x
        finite = self.seen.add(values)
        if finite is not None and not (self.which_pass == "first" and self.method.two_passes):
            self.method.look(finite)
        return x

    def merge(self, ranks: Ranks) -> None:
        """Joins what all processes have seen in the pass that just ended."""
        if self.which_pass != "second":
            self.seen.merge(ranks)
        if self.method.two_passes == (self.which_pass == "second"):
            self.method.merge(ranks)

    def start_second_pass(self) -> None:
        """Fixes the bins over the range that all processes have seen."""
        self.which_pass = "second"
        if self.seen.count:
            self.method.fix_bins(self.seen.low, self.seen.high)


def make_observer(
    observer: str | Callable[[], Any],
    qmin: int,
    qmax: int,
    name: str = "an activation",
    *,
    arguments: Mapping[str, float] = {},
    symmetric: bool = False,
) -> Observer:
    """A fresh per-tensor observer.

    Args:
        observer: "minmax", "moving_average", "histogram", "percentile" or "mse", or what makes an object with
            torch.ao's observer protocol, or one of `range_methods`.
        qmin: Smallest integer of the grid.
        qmax: Largest integer of the grid.
        name: The value, for messages.
        arguments: Of an observer that has a name: `observer_args.ACTIVATION_ARGUMENTS` lists them.
        symmetric: Whether the grid's zero point will be in its middle.

    Raises:
        PlanError: The factory fails, or what it makes does not follow the protocol.
    """
    if isinstance(observer, str):
        if observer not in METHODS:
            raise EdgeqatError(f"found the observer {observer!r}, wanted one of {', '.join(METHODS)}")
        method = METHODS[observer](**arguments)
        method.symmetric = symmetric
        return Observer(method)
    try:
        made = observer()
    except Exception as error:
        text = " ".join(str(error).split())
        raise PlanError(f"{name}: the factory of its observer failed: {type(error).__name__}: {text}") from error
    method = made if isinstance(made, Method) else Foreign(made, name)
    method.symmetric = symmetric
    return Observer(method)


def observed_range(observer: Observer, qmin: int, qmax: int, name: str, warn: bool = True) -> tuple[float, float]:
    """The range [low, high] that an observer settled on; `affine.activation_qparams` makes the grid from it.

    Warns with CalibrationWarning of data that no good grid can come from: nothing but one value, one huge outlier,
    infinite values; unless `warn` is False.

    Raises:
        PhaseError: It has seen no data, or NaN.
        PlanError: An observer of the user's own gives no usable scale and zero_point.
    """
    seen = observer.seen
    if seen.nans:
        raise PhaseError(f"{name} held NaN in calibration, though all inputs were finite; run the float model on them")
    if not seen.count:
        raise PhaseError(f"{name} saw no finite data in calibration; pass at least one batch of finite inputs")
    found = _suspicion(seen) if warn else ""
    if found:
        warnings.warn(f"{name}: {found}", CalibrationWarning, stacklevel=2)
    if seen.low == seen.high == 0.0:
        return 0.0, 0.0
    return observer.method.range(seen.low, seen.high, qmin, qmax)


def _suspicion(seen: Seen) -> str:
    """What is wrong with the data and what to do, "" if nothing is."""
    if seen.infinities:
        return "found infinite values in calibration, which no grid holds; run the float model on these inputs"
    if seen.low == seen.high:
        return f"found nothing but {seen.low:g} in calibration ({seen.count} values); calibrate with data that vary"
    outlier = seen.outlier()
    if outlier is not None:
        largest, typical = outlier
        return (
            f"found a magnitude of {largest:.3g} in calibration, {largest / typical:.3g} times the 99.9 % quantile, "
            f"{typical:.3g}; look at the data, or use the observer 'percentile', which leaves such values out"
        )
    return ""
