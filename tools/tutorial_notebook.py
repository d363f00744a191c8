"""docs/tutorial.ipynb, made of docs/tutorial.md: text and code in the page's order, nothing executed.

python tools/tutorial_notebook.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1] / "docs"
BLOCK = re.compile(r'^```(python|bash)(?: title="([\w.]+)")?\n(.*?)^```\n', flags=re.DOTALL | re.MULTILINE)


def main() -> None:
    """Writes the notebook."""
    (DOCS / "tutorial.ipynb").write_text(
        notebook((DOCS / "tutorial.md").read_text(encoding="utf-8")), encoding="utf-8"
    )


def notebook(page: str) -> str:
    """A notebook of a page: Python is a cell, one with a title a file, a command line a cell with a `!`."""
    cells, end = [], 0
    for found in BLOCK.finditer(page):
        cells += [_cell("markdown", page[end : found.start()], len(cells))]
        cells += [_cell("code", _code(*found.groups()), len(cells))]
        end = found.end()
    cells += [_cell("markdown", page[end:], len(cells))]
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    whole = {
        "cells": [cell for cell in cells if cell["source"]],
        "metadata": {"kernelspec": kernel, "language_info": {"name": "python"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return json.dumps(whole, indent=1) + "\n"


def _code(language: str, title: str | None, code: str) -> str:
    if title is not None:
        return f"%%writefile {title}\n{code}"
    if language == "python":
        return code
    # The installation comes first and once: %pip is the notebook's own.
    return "\n".join(f"%{line}" if line.startswith("pip ") else f"!{line}" for line in code.splitlines())


def _cell(kind: str, text: str, number: int) -> dict[str, Any]:
    lines = text.strip().splitlines(keepends=True)
    code: dict[str, Any] = {"execution_count": None, "outputs": []} if kind == "code" else {}
    return {"cell_type": kind, "id": f"cell-{number}", "metadata": {}, **code, "source": lines}


if __name__ == "__main__":
    main()
