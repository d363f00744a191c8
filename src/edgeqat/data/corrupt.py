"""Samples that cannot be read: counted, told of in one line, and too many of them refused."""

from __future__ import annotations

import warnings

from edgeqat.errors import DataError, SkippedWarning

__all__ = ["Skipped"]

SHOWN = 3
"""How many of them a message names."""


class Skipped:
    """Those of one load or one epoch.

    Args:
        what: How messages call the data.
        limit: `data.max_corrupt`; at 0 the first one is refused with its own message.
    """

    def __init__(self, what: str, limit: int) -> None:
        self._what, self._limit = what, limit
        self._names: dict[str, None] = {}  # a set that keeps its order

    def add(self, name: str, reason: str) -> None:
        """Counts a sample, once.

        Raises:
            DataError: there are more than the limit; it names this one.
        """
        self._names[name] = None
        n = len(self._names)
        if n > self._limit:
            more = f" ({n} samples cannot be read, and data.max_corrupt is {self._limit})" if self._limit else ""
            raise DataError(reason + more)

    def tell(self) -> None:
        """Warns of those that were skipped, if any."""
        if self._names:
            n, names = len(self._names), list(self._names)[:SHOWN]
            named = ", ".join(names) + (", ..." if n > len(names) else "")
            samples = "1 sample" if n == 1 else f"{n} samples"
            warnings.warn(
                f"{self._what}: skipped {samples} that cannot be read: {named}", SkippedWarning, stacklevel=2
            )
