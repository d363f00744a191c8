"""A run whose recipe names patterns: one groups blocks, one replaces them."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

import edgeqat as eq
from edgeqat.recipe import load_recipe
from helpers import EXACT_ARITHMETIC, CommandLine

CODE = """
import edgeqat as eq
from fusion_models import Blocks, ConvBnSilu, RepBlock, one_conv

class Mine(RepBlock):
    pass

def merged(block):
    assert isinstance(block, Mine)  # the class of this very import
    return one_conv(block)

def network():
    model = Blocks(ConvBnSilu(8, 8), Mine(8))
    model.head = __import__("torch").nn.Linear(8, 10)
    return model

silu = eq.FusionPattern("conv-bn-silu", ops=("conv2d", "batch_norm", "silu"))
rep = eq.FusionPattern("repvgg", modules=Mine, replace=merged)
"""


pytestmark = pytest.mark.usefixtures("few_rounds")


@pytest.fixture
def settings(tmp_path: Path) -> list[str]:
    (tmp_path / "net.py").write_text(CODE, encoding="utf-8")
    return [
        f"model={{factory: '{tmp_path}/net.py:network', args: {{}}}}",
        "model.args={}",
        "data.image_size=8",
        "data.calibration_n=900",
        "train.float_epochs=1",
        "train.qat_epochs=1",
        f"quantize.fusions=['{tmp_path}/net.py:silu', '{tmp_path}/net.py:rep']",
        "gate={max_drop: null, min_size_ratio: null, min_agreement: null}",
    ]


@EXACT_ARITHMETIC
def test_a_run_with_patterns_is_exact_and_compared_with_the_replaced_float_model(
    tmp_path: Path, settings: list[str]
) -> None:
    report = eq.run(load_recipe("digits-edge", settings), tmp_path / "out")
    for row in report.results:
        if row.runtime == "simulation":
            continue
        assert row.artifact is not None
        model = onnx.load(tmp_path / "out" / row.artifact)
        assert sum(node.op_type == "Conv" for node in model.graph.node) == 3  # the stem, and one a block
        if row.variant in ("ptq", "qat"):
            assert row.parity is not None and row.parity.bit_identical == 1.0 and row.ops is not None
            assert row.ops.float == 0


def test_inspect_shows_the_blocks(command: CommandLine, settings: list[str]) -> None:
    ended = command("inspect", "digits-edge", *(word for setting in settings for word in ("--set", setting)))
    assert ended.code == 0
    assert "blocks.0.0 (conv-bn-silu)" in " ".join(ended.out.split())
