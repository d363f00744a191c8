"""docs/ops.md says what the code does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_table_of_ops_is_what_the_plans_say() -> None:
    words = [sys.executable, "-W", "ignore", str(ROOT / "benchmarks" / "ops.py")]
    done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=300)
    written = (ROOT / "docs" / "ops.md").read_text(encoding="utf-8")
    assert written == done.stdout, "run: python benchmarks/ops.py > docs/ops.md"
