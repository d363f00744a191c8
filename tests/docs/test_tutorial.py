"""The tutorial is executed: as the notebook that is made of it, cell by cell, in an empty folder."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest

from helpers import ENVIRONMENT, EXACT_ARITHMETIC
from pages import DOCS
from tutorial_notebook import notebook


def test_the_notebook_is_the_page() -> None:
    """`python tools/tutorial_notebook.py` writes it."""
    page = (DOCS / "tutorial.md").read_text(encoding="utf-8")
    assert (DOCS / "tutorial.ipynb").read_text(encoding="utf-8") == notebook(page)


@EXACT_ARITHMETIC
@pytest.mark.timeout(600)
@pytest.mark.skipif(
    importlib.util.find_spec("nbclient") is None, reason="nbclient is not installed: pip install 'edgeqat[docs]'"
)
def test_every_cell_runs_and_prints_what_the_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nbformat
    from nbclient import NotebookClient

    # The kernel is a process of this environment, offline, whose commands are those of this interpreter.
    for name, value in {**ENVIRONMENT, "PYDEVD_DISABLE_FILE_VALIDATION": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    book = nbformat.read(DOCS / "tutorial.ipynb", as_version=4)
    book.cells = [cell for cell in book.cells if not cell.source.startswith("%pip install")]
    NotebookClient(book, timeout=400, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = "".join(output.get("text", "") for cell in book.cells for output in cell.get("outputs", []))
    assert printed.count("outputs equal to the reference, to the bit: 100%") == 3
    assert printed.count("first value that differs: None") == 3
    assert "ops in INT8, 0 in float" in printed
    assert "ship" in printed and "do not ship" not in printed
    for path in ("onnxruntime/model.onnx", "executorch/model.pte", "litert/model.tflite"):
        assert (tmp_path / "shapes" / path).is_file()
