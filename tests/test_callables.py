"""Callables by name; how each name is refused is tested with the model factories in test_factory.py."""

from __future__ import annotations

import os
import sys
import sysconfig
from pathlib import Path

import pytest

from edgeqat.callables import resolve_callable
from edgeqat.errors import ModelError
from helpers import run_python


def test_resolve_callable_names_the_key() -> None:
    assert resolve_callable("os.path:join", "task.loss") is os.path.join
    with pytest.raises(ModelError, match=r"^task.metric: found 'x', wanted module:callable"):
        resolve_callable("x", "task.metric")


def test_a_file_that_exits_on_import(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("import sys\nsys.exit(7)\n")
    with pytest.raises(ModelError, match=r"^data\.source: cannot import .*mine\.py: SystemExit: 7$"):
        resolve_callable(f"{tmp_path / 'mine.py'}:make", "data.source")


def test_a_file_finds_its_neighbours_as_python_would(tmp_path: Path) -> None:
    """While it is imported, when it is called, and not those of another file of the same name elsewhere."""
    for folder, number in (("one", 1), ("two", 2)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "edgeqat_test_net.py").write_text(f"number = {number}\n")
        (tmp_path / folder / "edgeqat_test_late.py").write_text(f"number = {number}0\n")
        (tmp_path / folder / "mine.py").write_text(
            "from edgeqat_test_net import number\n"
            "def make():\n    import edgeqat_test_late\n    return number + edgeqat_test_late.number\n"
        )
    before = list(sys.path)
    try:
        for folder, found in (("one", 11), ("two", 22), ("one", 11)):
            assert resolve_callable(f"{tmp_path / folder / 'mine.py'}:make", "model.factory")() == found
        one, two = (sys.path.index(str(tmp_path / folder)) for folder in ("one", "two"))
        assert sys.path.index(sysconfig.get_path("purelib")) < one < two  # behind whatever is installed
    finally:
        sys.path[:] = before


def test_a_module_of_the_working_directory(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("from neighbour import make\n")
    (tmp_path / "neighbour.py").write_text("def make():\n    return 3\n")
    code = "from edgeqat.callables import resolve_callable\nprint(resolve_callable('mine:make', 'data.source')())"
    isolated = f"import sys\nsys.path[:] = [p for p in sys.path if p]\n{code}"  # as the installed command starts
    ended = run_python(isolated, cwd=tmp_path)
    assert (ended.out, ended.err) == ("3\n", "")


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("net.py:Nett", "has no callable 'Nett'; did you mean Net?"),
        ("net.py:other", "has no callable 'other'"),
        ("nett.py:Net", "net.py?"),
    ],
)
def test_the_nearest_name_is_told(tmp_path: Path, target: str, words: str) -> None:
    (tmp_path / "net.py").write_text("class Net:\n    pass\n")
    with pytest.raises(ModelError) as caught:
        resolve_callable(f"{tmp_path / target}", "model.factory")
    assert str(caught.value).endswith(words)
