"""Float islands that read the batch's size keep it open in a TorchScript file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import edgeqat as eq
from edgeqat.errors import EdgeqatError
from edgeqat.lowering import to_torchscript, torchscript_island

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Tail(nn.Module):
    """A conv with ReLU, and a function of [N, 8, 6, 6] that stays in float."""

    def __init__(self, tail: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.tail = nn.Conv2d(3, 8, 3), tail

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(F.relu(self.conv(x)))


class Attention(nn.Module):
    """Self-attention over a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attend = nn.Conv2d(3, 16, 3, padding=1), nn.MultiheadAttention(16, 2, batch_first=True)
        self.fc = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x).flatten(2).transpose(1, 2)
        return self.fc(self.attend(tokens, tokens, tokens)[0].mean(1))


def masked(y: Tensor) -> Tensor:
    mask = torch.full((y.shape[0], 1, 6, 6), float("-inf"), dtype=y.dtype, device=y.device)
    return torch.softmax(y + torch.triu(mask, diagonal=4), -1)


TAILS = {
    "zeros": lambda y: torch.cat([torch.zeros(y.shape[0], 1, 6, 6), y], 1),
    "new_zeros": lambda y: torch.cat([y.new_zeros(y.shape[0], 1, 6, 6), y], 1),
    "expand": lambda y: y + torch.arange(6.0).expand(y.shape[0], 8, 6, 6),
    "arange": lambda y: y.flatten(1).sum(1) * torch.arange(y.shape[0]),
    "view": lambda y: torch.tanh(y).view(y.shape[0], 2, 4, 6, 6).transpose(1, 2).reshape(y.shape[0], 8, 6, 6),
    "product": lambda y: torch.tanh(y).reshape(y.shape[0] * 8, 36).softmax(1).reshape(y.shape[0], 8, 36),
    "share": lambda y: torch.tanh(y) / y.shape[0],
    "masked": masked,
}


@pytest.mark.parametrize("name", [*TAILS, "attention"])
def test_a_file_runs_with_any_batch(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Attention() if name == "attention" else Tail(TAILS[name])
    program = eq.convert(eq.calibrate(eq.prepare(model.eval(), X, "torchscript"), [X]))
    session = eq.lower(program, "torchscript", tmp_path / "a").session(engine="qnnpack")
    for n in (1, 2, 3, 4):
        # The ops are the very same ones; only the rounding of a quantized value may differ off x86.
        torch.testing.assert_close(
            session.run([X[:n]])[0], eq.reference(program, X[:n], "qnnpack"), rtol=1e-5, atol=1e-5
        )


def test_a_file_that_is_bound_to_one_batch_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = eq.convert(eq.calibrate(eq.prepare(Tail(TAILS["zeros"]).eval(), X, "torchscript"), [X]))
    monkeypatch.setattr(to_torchscript, "traceable_island", lambda op: op.body)  # traced, as other islands are
    with pytest.raises(EdgeqatError, match=r"does not run with a batch of 1 \(.*Sizes of tensors.* aten\.zeros"):
        eq.lower(program, "torchscript", tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_an_island_that_cannot_be_compiled_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = eq.convert(eq.calibrate(eq.prepare(Tail(TAILS["zeros"]).eval(), X, "torchscript"), [X]))
    monkeypatch.setattr(torchscript_island, "_respell", lambda graph, node: None)
    wanted = r"^TorchScript cannot compile the float ops aten\.zeros, which read the batch's size: "
    with pytest.raises(EdgeqatError, match=wanted):
        eq.lower(program, "torchscript", tmp_path / "a")
