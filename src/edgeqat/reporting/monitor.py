"""What a run tells while it works: a rich progress bar on a terminal, plain lines elsewhere, nothing by default."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

from edgeqat.reporting.terminal import message_console

__all__ = ["Advance", "ConsoleMonitor", "Followed", "Monitor", "Silent"]

BAR = 12
"""Columns of the bar: with rate, remaining time, loss and metric beside it a line fits 80."""

Item = TypeVar("Item", covariant=True)


class Advance(Protocol):
    """What is called after each step of long work."""

    def __call__(self, note: str = "") -> None:
        """A step is done; `note` is the latest figure, such as the running loss."""
        ...


class Monitor(Protocol):
    """Told of every stage, step and finding."""

    def stage(self, text: str) -> None:
        """A stage begins."""
        ...

    def line(self, text: str) -> None:
        """Something was found."""
        ...

    def detail(self, text: str) -> None:
        """Something was found that is of interest to who looks closely: one of many layers, how long a file took."""
        ...

    def steps(self, text: str, total: int) -> AbstractContextManager[Advance]:
        """Long work: yields what to call after each of `total` steps."""
        ...


class SizedIterable(Protocol[Item]):
    """What can be counted before it is iterated."""

    def __len__(self) -> int:
        """How many."""
        ...

    def __iter__(self) -> Iterator[Item]:
        """Each of them."""
        ...


class Followed(SizedIterable[Item]):
    """The items, as often as they are asked for; `monitor` is told of each that has been worked on."""

    def __init__(self, monitor: Monitor, text: str, items: SizedIterable[Item]) -> None:
        self._monitor, self._text, self._items = monitor, text, items

    def __len__(self) -> int:
        """How many."""
        return len(self._items)

    def __iter__(self) -> Iterator[Item]:
        """Each of them."""
        with self._monitor.steps(self._text, len(self)) as advance:
            for item in self._items:
                yield item
                advance()


def _nothing(note: str = "") -> None:
    pass


class Silent:
    """Tells nobody."""

    def stage(self, text: str) -> None:
        """Nothing."""

    def line(self, text: str) -> None:
        """Nothing."""

    def detail(self, text: str) -> None:
        """Nothing."""

    @contextmanager
    def steps(self, text: str, total: int) -> Iterator[Advance]:
        """Nothing."""
        yield _nothing


class ConsoleMonitor:
    """Writes to standard error, so that standard output holds results alone.

    Args:
        verbose: Whether details are told too.
        console: Where to; standard error if not given.
    """

    def __init__(self, verbose: bool = False, console: Console | None = None) -> None:
        self._console = message_console() if console is None else console
        self._verbose = verbose
        self._started = time.monotonic()

    def stage(self, text: str) -> None:
        """A bold line with the seconds since the start."""
        elapsed = time.monotonic() - self._started
        self._console.print(f"{elapsed:6.1f} s  {text}", style="bold", markup=False, soft_wrap=True)

    def line(self, text: str) -> None:
        """An indented line."""
        self._console.print(f"          {text}", markup=False, soft_wrap=True)

    def detail(self, text: str) -> None:
        """An indented line, where details are wanted."""
        if self._verbose:
            self.line(text)

    @contextmanager
    def steps(self, text: str, total: int) -> Iterator[Advance]:
        """A progress bar on a terminal; elsewhere `stage` and `line` tell enough."""
        if not self._console.is_interactive:
            yield _nothing
            return
        with Progress(*_columns(), console=self._console, transient=True) as progress:
            task = progress.add_task(text, total=total, note="")

            def advance(note: str = "") -> None:
                progress.update(task, advance=1, note=note)

            yield advance


def _columns() -> Sequence[ProgressColumn]:
    return (
        TextColumn("  {task.description}", markup=False),
        BarColumn(BAR),
        MofNCompleteColumn(),
        _Rate(),
        TimeRemainingColumn(compact=True),
        # The last column gives way where the terminal is narrow.
        TextColumn("{task.fields[note]}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis")),
    )


class _Rate(ProgressColumn):
    """Steps a second; seconds a step where there are fewer."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        if not speed:
            return Text("")
        return Text(f"{speed:.1f}/s" if speed >= 1 else f"{1 / speed:.1f} s each")
