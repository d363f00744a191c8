"""Masks of attention, sizes that are multiples of the batch, operands that training moves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import edgeqat as eq
from edgeqat.errors import CaptureError, InputError, PlanError
from helpers import EXACT_ARITHMETIC

X = torch.randn(8, 6, 16, generator=torch.Generator().manual_seed(0))


class Masked(nn.Module):
    """Self-attention whose later tokens are masked, in one of the ways that models do it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.inner, self.last, self.kind = nn.Linear(16, 48), nn.Linear(16, 16), kind
        lowest = {"buffer": float("-inf"), "large": -1e4, "sdpa": float("-inf")}.get(kind, 0.0)
        self.register_buffer("mask", torch.full((6, 6), lowest).triu(1))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.inner(x).chunk(3, -1)
        if self.kind == "sdpa":
            return self.last(F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask))
        mask = torch.full((6, 6), float("-inf")).triu(1) if self.kind == "inline" else self.mask
        scores = q @ k.transpose(1, 2) / 4
        scores = (scores.view(-1, 1, 6, 6) + mask).view(-1, 6, 6) if self.kind == "moved" else scores + mask
        return self.last(scores.softmax(-1) @ v)


@EXACT_ARITHMETIC
@pytest.mark.parametrize("kind", ["inline", "buffer", "large", "sdpa", "moved"])
def test_a_mask_hides_in_the_file_what_it_hides_in_the_model(kind: str, tmp_path: Path) -> None:
    """As integers -inf would be 0, and a large mask would leave one step for all the scores."""
    torch.manual_seed(0)
    model = Masked(kind).eval()
    sim = eq.calibrate(eq.prepare(model, X), [X])
    assert not [op for op in sim.plan.program.ops if op.kind.value == "add"]
    program = eq.convert(sim)
    artifact = eq.lower(program, "onnxruntime", tmp_path / "a")
    with torch.no_grad():
        expected, found = model(X), artifact.run(X)
    # 8 bits cost some hundredths of the largest output; a mask that is lost costs more than half.
    assert float((found - expected).abs().max()) <= 0.06 * float(expected.abs().max())
    if kind in ("inline", "buffer", "sdpa"):
        changed = torch.cat([X[:, :3], torch.randn(8, 3, 16)], 1)
        assert torch.equal(artifact.run(changed)[:, :3], found[:, :3])


def test_an_operand_without_a_grid_stays_in_float_and_says_so() -> None:
    class Infinite(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(16, 16), nn.Linear(16, 2)
            self.register_buffer("mask", torch.tensor([0.0, float("-inf")] * 8))

        def forward(self, x: Tensor) -> Tensor:
            return self.last((self.first(x) + self.mask).clamp(-3, 3))

    reasons = [row.reason for row in eq.plan(Infinite(), X).rows() if row.kind == "add.Tensor"]
    assert reasons == ["mask holds infinite or NaN values, which no grid has"]


def test_padding_masks_of_torchs_own_attention_are_captured(tmp_path: Path) -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

        def forward(self, x: Tensor, padding: Tensor) -> Tensor:
            return self.attention(x, x, x, key_padding_mask=padding)[0]

    padding = torch.zeros(8, 6, dtype=torch.bool)
    padding[:, 4:] = True
    model = Padded().eval()
    sim = eq.calibrate(eq.prepare(model, (X, padding)), [(X, padding)])
    artifact = eq.lower(eq.convert(sim), "onnxruntime", tmp_path / "a")
    expected = model(X, padding).detach()
    assert float((artifact.run((X, padding)) - expected).abs().max()) <= 0.06 * float(expected.abs().max())


class Windows(nn.Module):
    """A float op over four windows of each sample, whose number is not the batch."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.first, self.way = nn.Linear(16, 16), way

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).reshape(-1, 16).softmax(-1)
        if self.way == "mean":
            return y.view(x.shape[0], -1, 16).mean(1)
        return y.view(-1, 6, 16) if self.way == "known" else y.view(x.shape[0], -1)


@pytest.mark.parametrize("way", ["mean", "known", "flat"])
def test_a_multiple_of_the_batch_is_no_batch(way: str, tmp_path: Path) -> None:
    model = Windows(way).eval()
    program = eq.convert(eq.calibrate(eq.prepare(model, X), [X]))
    artifact = eq.lower(program, "onnxruntime", tmp_path / "a")
    for n in (1, 3, 8):
        expected = model(X[:n]).detach()
        found = artifact.run(X[:n])
        assert found.shape == expected.shape
        assert float((found - expected).abs().max()) <= 0.05


def test_verify_says_that_an_output_has_another_shape(tmp_path: Path) -> None:
    first, second = (nn.Sequential(nn.Linear(16, n)).eval() for n in (4, 5))
    programs = [eq.convert(eq.calibrate(eq.prepare(m, X[:, 0]), [X[:, 0]])) for m in (first, second)]
    artifact = eq.lower(programs[0], "onnxruntime", tmp_path / "a")
    with pytest.raises(InputError, match=r"^the artifact gives an output of shape \[8, 4\], the program \[8, 5\]"):
        eq.verify(artifact, programs[1], [X[:, 0]], check_hashes=False)


class LayerScale(nn.Module):
    """A gain of a branch, as in ConvNeXt and CaiT."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.last = nn.Linear(16, 16), nn.Linear(16, 2)
        self.gain = nn.Parameter(torch.ones(16))

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        return self.last(y + self.gain * F.gelu(y))


@EXACT_ARITHMETIC
@pytest.mark.parametrize("symmetric", [False, True])
def test_the_grid_of_an_operand_follows_it(symmetric: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = X[:, 0]
    config = eq.QConfig(eq.ActivationConfig(symmetric=symmetric))
    sim = eq.calibrate(eq.prepare(LayerScale(), x, qconfig_mapping=config), [x]).train()
    moved = torch.linspace(0.7, 1.2, 16)
    moved[3] = -0.1
    with torch.no_grad():  # a grid frozen at 0 .. 1 would hold neither end
        sim.gain.copy_(moved)
    program = eq.convert(sim.eval())  # without a forward pass in between
    op = next(op for op in program.ops if op.kind.value == "constant")
    scale, zero_point = program.grid_of(op.name).filled()
    real = (program.consts[op.name].data.double() - zero_point) * scale.double()
    # Half a step; a symmetric grid clips its largest value by another half.
    assert float((real - moved).abs().max()) <= (1.01 if symmetric else 0.51) * float(scale)
    assert float(scale) <= (2.41 if symmetric else 1.31) / 255
    artifact = eq.lower(program, "onnxruntime", tmp_path / "a")
    assert eq.verify(artifact, program, [x]).bit_identical == 1.0
    sim(x).sum().backward()
    assert sim.gain.grad is not None and bool((sim.gain.grad != 0).all())


@pytest.mark.parametrize("make", [nn.Dropout2d, nn.Dropout1d, nn.AlphaDropout, nn.FeatureAlphaDropout])
def test_every_dropout_drops_out_in_training_and_is_nothing_else(make: type[nn.Module]) -> None:
    layer = make(0.5)
    x = torch.randn(4, 3, 5, 5) if not isinstance(layer, nn.Dropout1d) else torch.randn(4, 3, 5)
    conv = nn.Conv1d if x.dim() == 3 else nn.Conv2d
    sim = eq.prepare(nn.Sequential(conv(3, 8, 1), layer, conv(8, 2, 1)), x)
    assert not [row for row in sim.plan.rows() if row.runs == "float"]
    eq.calibrate(sim, [x])
    sim.train()
    assert not torch.equal(sim(x), sim(x))
    sim.eval()
    assert torch.equal(sim(x), sim(x))


@EXACT_ARITHMETIC
def test_a_pool_with_a_divisor_of_its_own(tmp_path: Path) -> None:
    class Pool(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(F.avg_pool2d(self.conv(x), 3, 2, 1, divisor_override=5))

    model, x = Pool().eval(), torch.randn(4, 3, 9, 9)
    sim = eq.prepare(model, x)
    with torch.no_grad():  # one more rounding of float32
        assert float((sim(x) - model(x)).abs().max()) <= 1e-5
    program = eq.convert(eq.calibrate(sim, [x]))
    assert not program.float_origins()
    assert eq.verify(eq.lower(program, "onnxruntime", tmp_path / "a"), program, [x]).bit_identical == 1.0


def test_open_sizes_are_refused_before_anything_is_trained() -> None:
    x = torch.randn(2, 3, 16, 16)
    with pytest.raises(PlanError, match=r"^input 'input' has a dynamic height and width, but a file for torchsc"):
        eq.prepare(nn.Sequential(nn.Conv2d(3, 4, 3)), x, target="portable", dynamic_size=True)
    with pytest.raises(CaptureError, match=r"adaptive_avg_pool2d\.default to \[4, 4\] of an open size, wanted to 1"):
        eq.prepare(nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(4)), x, dynamic_size=True)
