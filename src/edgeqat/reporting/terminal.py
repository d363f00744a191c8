"""Where the command line writes: results to standard output, progress to standard error.

Colour and control codes go to a terminal alone, and not to one where NO_COLOR is set (no-color.org). A table may be
as wide as the terminal, COLUMNS where it is set, and has full lines on any other pipe.
"""

from __future__ import annotations

import os
import sys

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

__all__ = ["fits", "message_console", "table_console"]

PIPE_COLUMNS = 160
"""A table is read whole, so a pipe gets full lines too."""

UNBOUNDED = 100_000


def table_console() -> Console:
    """A console for tables on standard output."""
    columns = os.environ.get("COLUMNS", "")
    chosen = columns.isdigit() and int(columns) > 0
    width = None if chosen or sys.stdout.isatty() else PIPE_COLUMNS
    return Console(highlight=False, width=width, force_terminal=_plain())


def message_console() -> Console:
    """A console for progress and findings on standard error."""
    return Console(stderr=True, highlight=False, force_terminal=_plain())


def _plain() -> bool | None:
    # rich takes NO_COLOR for "no colour": bold type and the codes that redraw a progress bar would stay.
    return False if os.environ.get("NO_COLOR") else None


def fits(table: Table, console: Console) -> bool:
    """Whether a table can be printed without a line break inside any cell."""
    options = console.options.update(max_width=UNBOUNDED)
    return Measurement.get(console, options, table).maximum <= console.width
