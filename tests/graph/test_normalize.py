from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import edgeqat as eq
from edgeqat.graph.capture import capture
from helpers import EXACT_ARITHMETIC
from models import shake

IMAGE = torch.randn(4, 8, 6, 6, generator=torch.Generator().manual_seed(0))


class Function(nn.Module):
    """A function of a tensor as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def heads(x: Tensor) -> tuple[Tensor, ...]:
    """Queries, keys and values of two heads, as vision transformers cut them."""
    return x.flatten(2).reshape(x.shape[0], 8, 3, 2, 6).permute(2, 0, 3, 1, 4).unbind(0)


MOVES: dict[str, Callable[[Tensor], Tensor]] = {
    "chunk": lambda x: x.chunk(3, 1)[1] + x.chunk(3, 1)[0],
    "split": lambda x: x.split([1, 5, 2], dim=1)[-2],
    "split by size": lambda x: x.split(4, dim=-1)[1],
    "unbind": lambda x: x.unbind(2)[3],
    "select": lambda x: x[:, -1],
    "roll": lambda x: torch.roll(x, (2, -1), (2, 3)),
    "roll by nothing": lambda x: torch.roll(x, 6, 3),
    "stack": lambda x: torch.stack([x, x * 2], 2),
    "pixel shuffle": lambda x: F.pixel_shuffle(x, 2),
    "pixel unshuffle": lambda x: F.pixel_unshuffle(x, 3),
    "channel shuffle": lambda x: F.channel_shuffle(x, 4),
    "max pool 1d": lambda x: F.max_pool1d(x.flatten(2), 3, 2, 1),
    "average pool 1d": lambda x: F.avg_pool1d(x.flatten(2), 4),
    "adaptive pool 1d": lambda x: F.adaptive_avg_pool1d(x.flatten(2), 6),
    "difference": lambda x: x - x.flip(3),
    "qkv": lambda x: heads(x)[1],
}
COMPOUNDS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "hardswish": F.hardswish,
    "attention": lambda x: F.scaled_dot_product_attention(*heads(x)),
    "attention with a bias": lambda x: F.scaled_dot_product_attention(*heads(x), attn_mask=torch.ones(8, 8) * 0.3),
    "mean over time": lambda x: x.flatten(2).mean(-1),
    "mean over time, kept": lambda x: x.flatten(2).mean(-1, keepdim=True),
}


def run(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, list[str]]:
    captured = capture(Function(function), IMAGE)
    (found,) = fx.GraphModule(captured.root, captured.graph)(x)
    for node in captured.graph.nodes:
        if node.op == "call_function" and isinstance(node.meta.get("val"), Tensor):
            assert captured.origins[node.name].aten, node
    return found, [str(n.target) for n in captured.graph.nodes if n.op == "call_function"]


@pytest.mark.parametrize("name", MOVES)
def test_what_moves_elements_is_exact(name: str) -> None:
    for n in (1, 4, 7):
        x = torch.randn(n, 8, 6, 6)
        found, _ = run(MOVES[name], x)
        assert torch.equal(found, MOVES[name](x))


@pytest.mark.parametrize("name", COMPOUNDS)
def test_what_is_taken_apart_differs_in_the_last_bits(name: str) -> None:
    x = torch.randn(3, 8, 6, 6) * 3
    found, ops = run(COMPOUNDS[name], x)
    expected = COMPOUNDS[name](x.double())
    # Some units in the last place of float32, of the largest value that is added up.
    assert float((found - expected).abs().max()) <= 2e-6 * max(1.0, float(x.abs().max()))
    assert not any(op.startswith(("aten.silu", "aten.hardswish", "aten.scaled_dot")) for op in ops)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.scaled_dot_product_attention(*heads(x), is_causal=True),
        lambda x: torch.cat(x.unbind(0)[:1], 0) if isinstance(x.shape[0], int) and x.shape[0] == 1 else x.roll(1, 0),
    ],
    ids=["causal attention", "along the batch"],
)
def test_what_has_no_other_form_stays(function: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(4, 8, 6, 6)
    found, ops = run(function, x)
    assert torch.equal(found, function(x))
    assert any("scaled_dot" in op or "roll" in op for op in ops)


class PreActivation(nn.Module):
    """Batch norms without a conv before them, with and without parameters of their own."""

    def __init__(self, affine: bool) -> None:
        super().__init__()
        self.stem, self.pool = nn.Conv2d(3, 6, 3), nn.MaxPool2d(2)
        self.norm = nn.BatchNorm2d(6, eps=1e-3, momentum=0.03, affine=affine)
        self.conv, self.last = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(torch.relu(self.stem(x)))
        return self.last(x + self.conv(torch.relu(self.norm(x))))


@EXACT_ARITHMETIC
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("mode", ["fold", "live"])
def test_a_batch_norm_without_a_conv_becomes_one(mode: str, affine: bool, tmp_path: object) -> None:
    torch.manual_seed(1)
    model = shake(PreActivation(affine)).train()
    x = torch.randn(8, 3, 12, 12)
    sim = eq.calibrate(eq.prepare(model, x, batch_norm=mode), [x])
    assert not [row for row in sim.plan.rows() if row.runs == "float"]
    assert set(sim.plan.folded) == {"norm", "last"}
    optimizer = torch.optim.SGD([p for p in sim.parameters() if p.requires_grad], 0.01)
    for _ in range(2):
        optimizer.zero_grad()
        sim(x).square().mean().backward()
        optimizer.step()
    sim.eval()
    program = eq.convert(sim)
    artifact = eq.lower(program, "onnxruntime", f"{tmp_path}/artifact")
    parity = eq.verify(artifact, program, [x, x[:1]])
    assert (parity.bit_identical, parity.max_error_steps) == (1.0, 0.0)
    # 8 bits on three layers: some hundredths of the largest output; a lost gain or shift costs far more.
    back = sim.to_float().eval()
    expected = back(x).detach()
    assert float((artifact.run(x) - expected).abs().max()) <= 0.05 * float(expected.abs().max())
    assert back.norm.eps == 1e-3 and back.norm.momentum == 0.03
    assert set(back.state_dict()) == set(model.state_dict())


def test_one_norm_called_twice_needs_a_conv_each_time() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(torch.relu(self.norm(torch.relu(self.conv(x)))))

    reasons = {row.kind: row.reason for row in eq.plan(Twice().eval(), IMAGE).rows() if row.runs == "float"}
    assert "not folded" in reasons["batch_norm"]


class ReadTwice(nn.Module):
    """The first block of a pre-activation ResNet, and a norm over features: nothing before either can absorb it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.conv = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3, padding=1)
        self.features, self.last = nn.BatchNorm1d(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.conv(torch.relu(self.norm(x)))
        return self.last(torch.relu(self.features(x.mean((2, 3)))))


@EXACT_ARITHMETIC
def test_a_norm_whose_conv_others_read_too_says_so_and_runs_in_integers(tmp_path: object) -> None:
    torch.manual_seed(1)
    model = shake(ReadTwice()).eval()
    x = torch.randn(8, 3, 12, 12)
    sim = eq.prepare(model, x)
    with torch.no_grad():
        # Folding rounds each weight once; the depthwise convs add a rounding each.
        assert float((sim(x) - model(x)).abs().max()) <= 1e-5 * float(model(x).abs().max())
    assert not [row for row in sim.plan.rows() if row.runs == "float"]
    assert {r.name: r.reason for r in sim.plan.refusals} == {"norm": "not folded into stem, which add reads too"}
    program = eq.convert(eq.calibrate(sim, [x]))
    artifact = eq.lower(program, "onnxruntime", f"{tmp_path}/artifact")
    assert eq.verify(artifact, program, [x, x[:1]]).bit_identical == 1.0
