"""The arguments that observers take, by name: what a QConfig and a recipe may set, in torch.ao's words."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["ACTIVATION_ARGUMENTS", "WEIGHT_ARGUMENTS", "Argument", "wrong_argument"]


@dataclass(frozen=True)
class Argument:
    """A number that an observer takes.

    Attributes:
        low: Smallest value.
        high: Largest value.
        above: Whether `low` itself is too small.
        whole: Whether it counts something.
    """

    low: float
    high: float
    above: bool = False
    whole: bool = False

    def takes(self, value: object) -> bool:
        """Whether a value fits."""
        if isinstance(value, bool) or not isinstance(value, int if self.whole else (int, float)):
            return False
        return math.isfinite(value) and self.low <= value <= self.high and not (self.above and value == self.low)

    def describe(self) -> str:
        """What fits, in words."""
        kind = "a whole number from " if self.whole else "above " if self.above else ""
        return f"{kind}{self.low:g} {'up ' if self.above else ''}to {self.high:g}"


_PERCENTILE = Argument(50, 100, above=True)
_EPS = Argument(1e-10, 1)

ACTIVATION_ARGUMENTS: Mapping[str, Mapping[str, Argument]] = {
    "minmax": {},
    "moving_average": {"averaging_constant": Argument(0, 1, above=True)},
    "histogram": {"bins": Argument(2, 65536, whole=True)},
    "percentile": {"percentile": _PERCENTILE},
    "mse": {},
}
"""The share that a new batch counts; equal bins over the values seen; the share of values kept at either end."""

WEIGHT_ARGUMENTS: Mapping[str, Mapping[str, Argument]] = {
    "minmax": {"eps": _EPS},
    "mse": {"eps": _EPS},
    "percentile": {"percentile": _PERCENTILE, "eps": _EPS},
}
"""The share of weights that is not clipped; the smallest scale, as torch.ao's observers have it."""


def wrong_argument(observer: str, args: Mapping[str, object], known: Mapping[str, Mapping[str, Argument]]) -> str:
    """What is wrong with the arguments of a known observer, "" if nothing is.

    >>> wrong_argument("percentile", {"percentil": 99.9}, ACTIVATION_ARGUMENTS)
    "found percentil=99.9, but 'percentile' takes percentile (above 50 up to 100)"
    """
    takes = known[observer]
    for name, value in args.items():
        if name not in takes or not takes[name].takes(value):
            wanted = ", ".join(f"{key} ({argument.describe()})" for key, argument in takes.items())
            return f"found {name}={value!r}, but {observer!r} takes {wanted or 'no arguments'}"
    return ""
