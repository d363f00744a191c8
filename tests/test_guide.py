"""What docs/guide.md shows is executed."""

from __future__ import annotations

import re
from pathlib import Path

from helpers import run_python

GUIDE = (Path(__file__).parent.parent / "docs" / "guide.md").read_text(encoding="utf-8")


def test_the_example_of_a_mapping_runs_and_does_what_it_says(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", GUIDE, flags=re.DOTALL)
    ended = run_python(code, cwd=tmp_path)
    assert ended.code == 0, ended.err
    assert "3: linear float" in ended.out and "(its QConfig is None)" in ended.out


def test_every_script_that_it_names_exists() -> None:
    named = set(re.findall(r"`(examples/\w+\.py)`", GUIDE))
    assert named == {str(p.relative_to(p.parents[1])) for p in (Path(__file__).parents[1] / "examples").glob("*.py")}
