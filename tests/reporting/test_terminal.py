"""The width of a table: COLUMNS where it is set, full lines for a pipe."""

from __future__ import annotations

import pytest
from rich.table import Table

from edgeqat.reporting.terminal import fits, table_console


@pytest.mark.parametrize(("columns", "width"), [(None, 160), ("72", 72), ("", 160), ("0", 160), ("wide", 160)])
def test_a_pipe_is_wide_unless_columns_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, columns: str | None, width: int
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns is not None:
        monkeypatch.setenv("COLUMNS", columns)
    assert table_console().width == width


def test_a_table_fits_where_no_cell_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    for length, fitting in ((36, True), (37, False)):
        assert fits(Table("x" * length), table_console()) == fitting
