"""The scripts in examples/ run as they stand."""

from __future__ import annotations

from pathlib import Path

from helpers import run_python

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_custom_fusion(tmp_path: Path) -> None:
    ended = run_python((EXAMPLES / "custom_fusion.py").read_text(encoding="utf-8"), cwd=tmp_path)
    assert ended.code == 0, ended.err
    for words in (
        "entry_block.0: conv INT8 u8 [s8 per-channel] -> u8 fused entry_block.1 + relu",
        "in 2.0 (conv-bn-silu)",
        "in 3 (squeeze-excite)",
        "not fused 1: refused by the check of squeeze-excite: 16 channels, wanted 32 or more",
        "converted: 23 integer ops, 0 in float",
        "with squeeze-excite in float: 11 ops in float",
    ):
        assert words in ended.out, ended.out
    assert list(tmp_path.iterdir()) == []
