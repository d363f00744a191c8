"""The site builds without a warning: no broken link or anchor, no page without a place, every docstring found."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

import edgeqat
from pages import DOCS, ROOT


@pytest.mark.skipif(
    importlib.util.find_spec("mkdocs") is None, reason="mkdocs is not installed: pip install 'edgeqat[docs]'"
)
def test_it_builds_strictly(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "site" / "reference.html").read_text(encoding="utf-8")
    for name in edgeqat.__all__:
        if name != "__version__":
            assert re.search(rf'id="edgeqat(\.\w+)*\.{name}"', page), name
    assert "Where torch.distributed is initialised" in page, "docstrings are there, not names alone"


def test_the_reference_lists_the_public_names_in_their_order() -> None:
    listed = re.findall(
        r"^::: edgeqat\.(\w+)$", (DOCS / "reference.md").read_text(encoding="utf-8"), flags=re.MULTILINE
    )
    assert [*listed, "__version__"] == edgeqat.__all__
