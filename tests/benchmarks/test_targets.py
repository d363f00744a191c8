from __future__ import annotations

from pathlib import Path

import pytest

import targets

PAGE = Path(__file__).parents[2] / "docs" / "targets.md"


def test_the_page_is_what_the_script_prints(capsys: pytest.CaptureFixture[str]) -> None:
    targets.main()
    assert PAGE.read_text(encoding="utf-8") == capsys.readouterr().out, "run benchmarks/targets.py > docs/targets.md"
