"""Fake quantization of any grid, and learned ranges: gradients against the formulas of the papers, in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from edgeqat import affine
from edgeqat.simulate.gradients import (
    Integers,
    fake_quantize,
    learned_fake_quantize,
    learned_parameter,
    lsq_factor,
    offset_zero_point,
)

SUM_ROUNDING = 2e-5
"""Float32 sums and differences of a few hundred products, relative to the sum of their magnitudes."""


@st.composite
def integer_ranges(draw: st.DrawFn, axis: bool = False) -> Integers:
    """Signed, unsigned and narrow ranges of 2 to 8 bits."""
    bits, kind = draw(st.integers(2, 8)), draw(st.sampled_from(["signed", "unsigned", "narrow"]))
    half = 2 ** (bits - 1)
    qmin, qmax = {"signed": (-half, half - 1), "unsigned": (0, 2 * half - 1), "narrow": (1 - half, half - 1)}[kind]
    return Integers(qmin, qmax, draw(st.sampled_from([None, 0, 1])) if axis else None)


def example(seed: int, integers: Integers) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x, upstream gradient, scale, zero_point); no x within 1e-3 steps of a tie or a bound."""
    random = torch.Generator().manual_seed(seed)
    count = () if integers.axis is None else ((5, 7)[integers.axis],)
    scale = torch.rand(count, generator=random) * 0.3 + 0.01
    zero = torch.randint(integers.qmin, integers.qmax + 1, count, generator=random, dtype=torch.int32)
    s, z = affine.broadcast(scale, integers.axis, 3), affine.broadcast(zero, integers.axis, 3)
    span = integers.qmax - integers.qmin
    steps = torch.rand(5, 7, 9, generator=random) * 2 * span + integers.qmin - span / 2 - z
    halves = (steps * 2).round()
    steps = torch.where((steps * 2 - halves).abs() < 2e-3, steps + 0.1, steps)
    return steps * s, torch.randn(5, 7, 9, generator=random), scale, zero


def reduce(x: Tensor, integers: Integers) -> Tensor:
    return x.sum([d for d in range(3) if d != integers.axis])


@given(integer_ranges(axis=True), st.integers(0, 10_000))
def test_any_grid_forward_and_straight_through(integers: Integers, seed: int) -> None:
    x, grad, scale, zero = example(seed, integers)
    x.requires_grad_()
    y = fake_quantize(x, scale, zero, integers)
    assert torch.equal(y, affine.fake_quantize(x, scale, zero, integers.qmin, integers.qmax, integers.axis))
    y.backward(grad)
    s, z = affine.broadcast(scale, integers.axis, 3).double(), affine.broadcast(zero, integers.axis, 3)
    q = torch.round(x.detach().double() / s) + z
    expected = torch.where((q >= integers.qmin) & (q <= integers.qmax), grad, torch.zeros(()))
    assert x.grad is not None and torch.equal(x.grad, expected)


@given(integer_ranges(), st.integers(0, 10_000))
def test_it_equals_torch_where_both_are_defined(integers: Integers, seed: int) -> None:
    x, grad, _, zero = example(seed, integers)
    scale = torch.tensor(0.125)  # torch multiplies by 1 / scale, which is exact for a power of two
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y = fake_quantize(ours, scale, zero, integers)
    expected = torch.fake_quantize_per_tensor_affine(theirs, scale, zero, integers.qmin, integers.qmax)
    assert torch.equal(y, expected)
    y.backward(grad)
    expected.backward(grad)
    assert ours.grad is not None and torch.equal(ours.grad, theirs.grad)


@given(st.integers(2, 8), st.integers(0, 10_000), st.sampled_from([0, 1]))
def test_per_channel_equals_torch_where_both_are_defined(bits: int, seed: int, axis: int) -> None:
    integers = Integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1, axis)
    x, _, scale, zero = example(seed, integers)
    scale = torch.exp2(torch.log2(scale).round())
    expected = torch.fake_quantize_per_channel_affine(x, scale, zero, axis, integers.qmin, integers.qmax)
    assert torch.equal(fake_quantize(x, scale, zero, integers), expected)


@given(integer_ranges(axis=True), st.integers(0, 10_000))
def test_lsq_is_the_paper_s_formula(integers: Integers, seed: int) -> None:
    x, grad, scale, _ = example(seed, integers)
    x.requires_grad_()
    step = scale.clone().requires_grad_()
    learned_fake_quantize(x, step, integers).backward(grad)
    s = affine.broadcast(scale, integers.axis, 3).double()
    v = x.detach().double() / s  # equation 3 and 5: below -Q_N, above Q_P, and between
    term = torch.where(
        v <= integers.qmin, integers.qmin, torch.where(v >= integers.qmax, integers.qmax, v.round() - v)
    )
    passed = torch.where((v > integers.qmin) & (v < integers.qmax), grad, torch.zeros(()))
    assert x.grad is not None and torch.equal(x.grad, passed)
    found, expected = step.grad, reduce(grad.double() * term, integers)
    magnitude = reduce((grad * x.detach()).abs().double() / s + grad.abs() * integers.qmax, integers)
    assert found is not None and bool(((found - expected).abs() <= SUM_ROUNDING * magnitude).all())


@given(st.integers(2, 8), st.integers(0, 10_000), st.sampled_from([None, 0, 1]))
def test_lsq_plus_is_the_paper_s_formula(bits: int, seed: int, axis: int | None) -> None:
    integers = Integers(0, 2**bits - 1, axis)
    x, grad, scale, zero = example(seed, integers)
    x.requires_grad_()
    step, offset = scale.clone().requires_grad_(), (-zero * scale).requires_grad_()
    y = learned_fake_quantize(x, step, integers, offset)
    assert torch.equal(offset_zero_point(scale, offset.detach(), integers), zero)
    assert torch.equal(y, affine.fake_quantize(x, scale, zero, 0, integers.qmax, axis))
    y.backward(grad)
    s, z = affine.broadcast(scale, axis, 3).double(), affine.broadcast(zero, axis, 3)
    v = x.detach().double() / s + z  # (x - beta) / s
    inside = (v > 0) & (v < integers.qmax)
    term = torch.where(inside, v.round() - v, v.clamp(0, integers.qmax))
    magnitude = reduce((grad * x.detach()).abs().double() / s + grad.abs() * 2 * integers.qmax, integers)
    assert x.grad is not None and torch.equal(x.grad, torch.where(inside, grad, torch.zeros(())))
    assert step.grad is not None and offset.grad is not None
    assert bool(((step.grad - reduce(grad.double() * term, integers)).abs() <= SUM_ROUNDING * magnitude).all())
    outside = reduce(torch.where(inside, 0.0, grad.double()), integers)
    assert bool(((offset.grad - outside).abs() <= SUM_ROUNDING * reduce(grad.abs().double(), integers)).all())


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels last"])
def test_the_order_of_memory_changes_no_gradient(order: torch.memory_format) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 5, 4, 6).to(memory_format=order).requires_grad_()
    grad = torch.randn(3, 5, 4, 6)  # contiguous, whatever x is
    step = torch.tensor(0.1, requires_grad=True)
    learned_fake_quantize(x, step, Integers(-7, 7)).backward(grad)
    v = x.detach().double() / 0.1
    expected = (grad * torch.where(v.abs() < 7, v.round() - v, v.clamp(-7, 7))).sum()
    assert float(step.grad) == pytest.approx(float(expected), abs=1e-3)


def test_bounds_of_a_learned_parameter_hold_and_let_go() -> None:
    low, high = torch.tensor(0.1), torch.tensor(1.0)
    parameter = torch.tensor([0.05, 0.05, 0.5, 2.0, 2.0], requires_grad=True)
    y = learned_parameter(parameter, low, high, factor=0.5)
    assert y.tolist() == pytest.approx([0.1, 0.1, 0.5, 1.0, 1.0])
    y.backward(torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0]))
    # A positive gradient makes a parameter smaller: below its range only a negative one passes.
    assert parameter.grad is not None and parameter.grad.tolist() == [0.0, -0.5, 0.5, 0.5, 0.0]


def test_the_factor_is_the_paper_s() -> None:
    assert lsq_factor(288, Integers(-7, 7, 0)) == pytest.approx(1 / (288 * 7) ** 0.5)


def test_training_recovers_a_planted_scale() -> None:
    """Data that lies on a grid is reproduced best by that grid: gradient descent finds its scale from 1.3 of it."""
    torch.manual_seed(0)
    integers, planted = Integers(-7, 7, 0), torch.tensor([0.05, 0.11])
    q = torch.randint(-7, 8, (2, 4096)).float()
    x = q * planted[:, None] + torch.randn(2, 4096) * 0.05 * planted[:, None]
    step = (1.3 * planted).requires_grad_()
    optimizer = torch.optim.SGD([step], lr=2e-5)
    for _ in range(400):
        optimizer.zero_grad()
        (0.5 * (learned_fake_quantize(x, step, integers) - x).pow(2).sum()).backward()
        optimizer.step()
    assert torch.allclose(step.detach(), planted, rtol=0.01)


@pytest.mark.parametrize("learned", [False, True])
def test_under_bfloat16_the_arithmetic_is_float32(learned: bool) -> None:
    torch.manual_seed(0)
    x, scale, integers = (torch.randn(1000) * 3).bfloat16(), torch.tensor(0.0123), Integers(0, 255)
    zero = torch.tensor(0 if learned else 100, dtype=torch.int32)
    y = learned_fake_quantize(x, scale, integers) if learned else fake_quantize(x, scale, zero, integers)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, affine.fake_quantize(x.float(), scale, zero, 0, 255).bfloat16())
