"""Every example runs, and prints what it promises; README.md lists them all."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import EXACT_ARITHMETIC, run_python

EXAMPLES = Path(__file__).parents[2] / "examples"
ARGUMENTS = {"full_pipeline.py": ["--epochs", "1", "--qat-epochs", "1"]}
NEEDS = {"lightning_module.py": "lightning"}
"""What the tests do not install."""


@EXACT_ARITHMETIC
@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_example(name: str, tmp_path: Path) -> None:
    needed = NEEDS.get(name)
    if needed is not None and importlib.util.find_spec(needed) is None:
        pytest.skip(f"{name} needs {needed}: pip install {needed}")
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
        "own_loop.py": ["test images: float ", "100% of the file's logits are bit-identical"],
        "lightning_module.py": ["best of quantized", "100% of its logits bit-identical"],
        "ddp.py": ["2 processes ended with equal weights and grids", "100% of its logits bit-identical"],
        "own_dataset.py": ["qat on onnxruntime: within_one_hour", "artifact: 12 o'clock, 1 o'clock", "gate passed"],
        "detector.py": ["boxes: [32, 16, 4], ", "scores: [32, 16], ", "100% of all outputs bit-identical"],
        "keywords.py": ["onnxruntime: ", "litert: ", "100% of the logits bit-identical to reference:litert/xnnpack"],
        "full_pipeline.py": ["onnxruntime: 100.00% of the logits", "torchscript: 100.00% of the logits"],
    }
    for text in promised.get(name, []):
        assert text in done.stdout, done.stdout


def test_an_example_says_what_it_lacks(tmp_path: Path) -> None:
    """One line, and no traceback."""
    code = "import runpy, sys; sys.modules['lightning'] = None; runpy.run_path(sys.argv[1], run_name='__main__')"
    ended = run_python(code, EXAMPLES / "lightning_module.py", cwd=tmp_path)
    assert ended.code == 1
    assert ended.err == "this example needs Lightning, which is not installed: pip install lightning\n"


def test_the_readme_lists_every_file_and_nothing_else() -> None:
    readme = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    rows = [line for line in readme.splitlines() if line.startswith("| [")]
    listed = re.findall(r"\[([^]]+)\]\(([^)]+)\)", "\n".join(rows))
    assert all(text == place for text, place in listed)
    paths = [path.relative_to(EXAMPLES) for path in EXAMPLES.rglob("*") if path.is_file()]
    files = [path.as_posix() for path in paths if {"__pycache__", "build"}.isdisjoint(path.parts)]
    assert sorted(place for _, place in listed) == sorted(set(files) - {"README.md"})
    assert all(len(row.split(" | ")[1]) > 10 for row in rows)
