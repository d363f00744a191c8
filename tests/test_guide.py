"""What docs/guide.md shows is executed."""

from __future__ import annotations

import re
from pathlib import Path

from helpers import EXACT_ARITHMETIC, run_python

GUIDE = (Path(__file__).parent.parent / "docs" / "guide.md").read_text(encoding="utf-8")


def run_block(word: str, folder: Path) -> str:
    """What the one block of code that holds a word prints."""
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", GUIDE, flags=re.DOTALL) if word in block]
    ended = run_python(code, cwd=folder)
    assert ended.code == 0, ended.err
    return ended.out


def test_every_block_is_run() -> None:
    assert GUIDE.count("```python") == 3


def test_the_example_of_a_mapping_runs_and_does_what_it_says(tmp_path: Path) -> None:
    found = run_block("eq.QConfigMapping()", tmp_path)
    assert "3: linear float" in found and "(its QConfig is None)" in found


def test_the_example_of_the_aids_runs_and_no_layer_gets_worse(tmp_path: Path) -> None:
    assert run_block("eq.adaround(", tmp_path) == "True\n"


@EXACT_ARITHMETIC
def test_the_example_of_pixels_runs_and_does_what_it_says(tmp_path: Path) -> None:
    assert run_block("eq.Pixels(", tmp_path) == "uint8\nTrue\n"


def test_every_example_is_named_where_a_reader_looks_for_it() -> None:
    examples = Path(__file__).parents[1] / "examples"
    readme = examples / "README.md"
    text = GUIDE + (readme.read_text(encoding="utf-8") if readme.exists() else "")
    assert [path.name for path in examples.glob("*.py") if path.name not in text] == []
