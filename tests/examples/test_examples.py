"""Every example runs, and prints what it promises."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from helpers import EXACT_ARITHMETIC

EXAMPLES = Path(__file__).parents[2] / "examples"
ARGUMENTS = {"full_pipeline.py": ["--epochs", "1", "--qat-epochs", "1"]}


@EXACT_ARITHMETIC
@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_example(name: str, tmp_path: Path) -> None:
    words = [sys.executable, "-W", "ignore", str(EXAMPLES / name), *ARGUMENTS.get(name, [])]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr == ""
    promised = {
        "observers.py": ["torch.ao's objects give the same plan", "fc: linear float"],
        "residuals.py": ["100% of the outputs are bit-identical", "QLinearAdd", "QLinearConcat", "QLinearMul"],
        "full_pipeline.py": ["onnxruntime: 100.00% of the logits", "torchscript: 100.00% of the logits"],
    }
    for text in promised.get(name, []):
        assert text in done.stdout, done.stdout
