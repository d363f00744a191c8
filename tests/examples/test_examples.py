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
        "custom_fusion.py": [
            "entry_block.0: conv INT8 u8 [s8 per-channel] -> u8 fused entry_block.1 + relu",
            "in 2.0 (conv-bn-silu)",
            "in 3 (squeeze-excite)",
            "not fused 1: refused by the check of squeeze-excite: 16 channels, wanted 32 or more",
            "converted: 23 integer ops, 0 in float",
            "with squeeze-excite in float: 10 ops in float",
        ],
        "user_target.py": ["100% of the outputs are bit-identical", "weight 2**-", "zero point 128"],
        "observers.py": ["torch.ao's objects give the same plan", "fc: linear float"],
        "residuals.py": ["100% of the outputs are bit-identical", "QLinearAdd", "QLinearConcat", "QLinearMul"],
        "accuracy_drop.py": ["sensitive: residual_block.conv.", "search, ", "test samples: float ", "AdaRound "],
        "full_pipeline.py": ["onnxruntime: 100.00% of the logits", "torchscript: 100.00% of the logits"],
    }
    for text in promised.get(name, []):
        assert text in done.stdout, done.stdout
