from __future__ import annotations

from pathlib import Path

import torch

import edgeqat as eq
from helpers import EXACT_ARITHMETIC
from models import SmallNet, shake
from mutations import KINDS, draw, judge

IMAGE = torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@EXACT_ARITHMETIC
def test_every_change_that_alters_anything_is_named_at_an_op_that_reads_the_number(tmp_path: Path) -> None:
    torch.manual_seed(0)
    program = eq.convert(eq.calibrate(eq.prepare(shake(SmallNet()).eval(), IMAGE), [IMAGE]))
    artifact = eq.lower(program, "onnxruntime", tmp_path / "a")
    outcomes = judge(artifact, program, draw(artifact.path, 32), [IMAGE])
    altered = [outcome for outcome in outcomes if outcome.altered]
    assert {outcome.change.kind for outcome in outcomes} == set(KINDS)
    assert len(altered) >= 12  # a scale's last bit, or a bias far below one step, often changes nothing
    assert [outcome for outcome in altered if not outcome.at_its_op] == []
    assert all(outcome.named is None for outcome in outcomes if not outcome.altered)
