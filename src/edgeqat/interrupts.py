"""Being asked to stop, by Ctrl-C or a scheduler's SIGTERM, where there is a better moment for it than now."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["asked_to_stop"]

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def asked_to_stop(tell: Callable[[str], None]) -> Iterator[Callable[[], bool]]:
    """Within it the first signal is remembered, and a second one raises KeyboardInterrupt at once.

    Args:
        tell: Given a line when the first one comes.

    Yields:
        Whether one came, which the caller must heed. Outside the main thread, which gets all signals, none does.
    """
    found: list[int] = []

    def remember(number: int, _: FrameType | None) -> None:
        if found:
            raise KeyboardInterrupt
        found.append(number)
        tell(f"{signal.Signals(number).name}: stopping after this step; once more stops at once")

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = {number: signal.signal(number, remember) for number in SIGNALS}
    try:
        yield lambda: bool(found)
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: it was not set by Python
