from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import edgeqat as eq
from edgeqat.interpreter.arithmetic import ARITHMETICS
from edgeqat.lowering import golden
from edgeqat.lowering.golden import golden_vectors, sample_inputs, samples_together
from models import FloatMiddle, SmallNet, shake

N = 16


def converted(model: nn.Module, size: int = 32) -> eq.QuantizedProgram:
    torch.manual_seed(0)
    x = torch.randn(4, 3, size, size)
    return eq.convert(eq.calibrate(eq.prepare(shake(model).eval(), x, "portable"), [x]))


@pytest.mark.parametrize("arithmetic", [name for name, a in ARITHMETICS.items() if a.dequantize_block == 1])
def test_computed_in_parts_they_are_the_same(arithmetic: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = converted(SmallNet())
    inputs = sample_inputs(program)
    assert samples_together(program, ARITHMETICS[arithmetic], N) == N
    whole, _ = golden_vectors(program, inputs, [arithmetic], b"", None)
    # Three samples of the largest value, [8, 32, 32]: the last part has one.
    monkeypatch.setattr(golden, "PART_ELEMENTS", 3 * 8 * 32 * 32)
    assert samples_together(program, ARITHMETICS[arithmetic], N) == 3
    parts, _ = golden_vectors(program, inputs, [arithmetic], b"", None)
    assert list(parts) == list(whole)
    assert all(torch.equal(parts[name], whole[name]) for name in whole)


class OddSum(nn.Module):
    """Its addition has 3 * 5 * 5 elements a sample, which fill no block."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x)


class BatchInside(nn.Module):
    """The batch is not the first dimension of its output."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).transpose(0, 1)


class Total(nn.Module):
    """A number without a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).sum()


def test_samples_that_depend_on_their_batch_stay_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(golden, "PART_ELEMENTS", 1)
    odd = converted(OddSum(), 5)
    kept = [name for name, arithmetic in ARITHMETICS.items() if samples_together(odd, arithmetic, N) == N]
    assert sorted(kept) == ["fbgemm", "litert/builtin", "onednn", "x86"]
    for model in (FloatMiddle(), BatchInside(), Total()):
        assert samples_together(converted(model), ARITHMETICS["onnxruntime/x86"], N) == N
