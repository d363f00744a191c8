"""What a run tells while it works: a rich progress bar on a terminal, plain lines elsewhere, nothing by default."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

__all__ = ["ConsoleMonitor", "Monitor", "Silent"]


class Monitor(Protocol):
    """Told of every stage, step and finding."""

    def stage(self, text: str) -> None:
        """A stage begins."""
        ...

    def line(self, text: str) -> None:
        """Something was found."""
        ...

    def steps(self, text: str, total: int) -> AbstractContextManager[Callable[[], None]]:
        """Long work: yields what to call after each of `total` steps."""
        ...


class Silent:
    """Tells nobody."""

    def stage(self, text: str) -> None:
        """Nothing."""

    def line(self, text: str) -> None:
        """Nothing."""

    @contextmanager
    def steps(self, text: str, total: int) -> Iterator[Callable[[], None]]:
        """Nothing."""
        yield lambda: None


class ConsoleMonitor:
    """Writes to standard error, so that standard output holds results alone."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._started = time.monotonic()

    def stage(self, text: str) -> None:
        """A bold line with the seconds since the start."""
        elapsed = time.monotonic() - self._started
        self._console.print(f"{elapsed:6.1f} s  {text}", style="bold", markup=False, soft_wrap=True)

    def line(self, text: str) -> None:
        """An indented line."""
        self._console.print(f"          {text}", markup=False, soft_wrap=True)

    @contextmanager
    def steps(self, text: str, total: int) -> Iterator[Callable[[], None]]:
        """A progress bar on a terminal; elsewhere `stage` and `line` tell enough."""
        if not sys.stderr.isatty():
            yield lambda: None
            return
        columns = (
            TextColumn("          {task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self._console, transient=True) as progress:
            task = progress.add_task(text, total=total)
            yield lambda: progress.advance(task)
