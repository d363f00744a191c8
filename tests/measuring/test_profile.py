from __future__ import annotations

from pathlib import Path

import pytest
import torch

import edgeqat as eq
from edgeqat.lowering.op_time import OpTime, totals
from edgeqat.measuring.profile import profile_ops
from models import SmallNet, shake

IMAGE = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("runtime", "conv", "count"), [("onnxruntime", "QLinearConv", 3), ("torchscript", "quantized::conv2d", 3)]
)
def test_the_runtime_tells_where_the_time_goes(runtime: str, conv: str, count: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sim = eq.calibrate(eq.prepare(shake(SmallNet()).eval(), IMAGE, runtime), [IMAGE])
    artifact = eq.lower(eq.convert(sim), runtime, tmp_path / "a")
    found = profile_ops(artifact)
    convs = sum(time.count for time in found if time.op.startswith(conv))
    assert convs == count
    assert all(time.ms >= 0 for time in found) and sum(time.ms for time in found) > 0
    assert [time.ms for time in found] == sorted((time.ms for time in found), reverse=True)


def test_runs_add_up_by_kind_and_call() -> None:
    events = [("a", 1.0), ("b", 5.0), ("a", 2.0), ("a", 1.0), ("b", 5.0), ("a", 2.0)]
    assert totals(events, 2) == (OpTime("b", 1, 5.0), OpTime("a", 2, 3.0))
