"""How wide a table may be: a terminal's own columns, COLUMNS where it is set, full lines for any other pipe."""

from __future__ import annotations

import os
import sys

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

__all__ = ["fits", "table_console"]

PIPE_COLUMNS = 160
"""A table is read whole, so a pipe gets full lines too."""

UNBOUNDED = 100_000


def table_console() -> Console:
    """A console for tables on standard output."""
    columns = os.environ.get("COLUMNS", "")
    chosen = columns.isdigit() and int(columns) > 0
    return Console(highlight=False, width=None if chosen or sys.stdout.isatty() else PIPE_COLUMNS)


def fits(table: Table, console: Console) -> bool:
    """Whether a table can be printed without a line break inside any cell."""
    options = console.options.update(max_width=UNBOUNDED)
    return Measurement.get(console, options, table).maximum <= console.width
