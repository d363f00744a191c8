from __future__ import annotations

import pytest
import torch
from torch import nn

import edgeqat as eq
from edgeqat.lowering.engine import X86_FROM, fastest_engine, mean_macs
from edgeqat.replay.kernels import arithmetic_here

WIDE = pytest.mark.skipif(arithmetic_here("torchscript/x86") is None, reason="x86 and fbgemm are exact with VNNI only")


def program(model: nn.Module, x: torch.Tensor) -> eq.QuantizedProgram:
    return eq.convert(eq.calibrate(eq.prepare(model.eval(), x, "torchscript"), [x]))


def test_multiply_adds_are_those_of_one_sample_by_hand() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, groups=2), nn.Flatten(), nn.Linear(6 * 4 * 4, 5))
    conv, linear = 4 * 4 * 6 * (4 // 2) * 9, 96 * 5
    assert mean_macs(program(model, torch.randn(2, 4, 9, 9))) == (conv + linear) / 2


def test_a_program_without_integers_has_none() -> None:
    x = torch.randn(2, 4)
    sim = eq.prepare(nn.Linear(4, 2).eval(), x, "torchscript", eq.QConfigMapping().set_global(None))
    assert mean_macs(eq.convert(sim)) == 0.0


@WIDE
@pytest.mark.parametrize(("size", "engine"), [(8, "fbgemm"), (64, "x86")])
def test_small_ops_run_on_fbgemm_and_large_ones_on_x86(size: int, engine: str) -> None:
    found = program(nn.Conv2d(16, 16, 3, padding=1), torch.randn(2, 16, size, size))
    assert (mean_macs(found) >= X86_FROM) == (engine == "x86")
    assert fastest_engine(found) == engine
