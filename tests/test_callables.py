"""Callables by name; how each name is refused is tested with the model factories in test_factory.py."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from edgeqat.callables import resolve_callable
from edgeqat.errors import ModelError


def test_resolve_callable_names_the_key() -> None:
    assert resolve_callable("os.path:join", "task.loss") is os.path.join
    with pytest.raises(ModelError, match=r"^task.metric: found 'x', wanted module:callable"):
        resolve_callable("x", "task.metric")


def test_a_file_that_exits_on_import(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("import sys\nsys.exit(7)\n")
    with pytest.raises(ModelError, match=r"^data\.source: cannot import .*mine\.py: SystemExit: 7$"):
        resolve_callable(f"{tmp_path / 'mine.py'}:make", "data.source")
