from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edgeqat import affine
from edgeqat.simulate.gradients import (
    ClampBounds,
    Integers,
    learned_fake_quantize,
    quantize_activation,
    quantize_bias,
    quantize_parameter,
)

SCALES = st.floats(2**-12, 4.0, width=32)


@given(SCALES, st.integers(0, 255), st.integers(0, 1000))
def test_forward_equals_the_pure_numerics(scale: float, zero: int, seed: int) -> None:
    x = torch.randn(300, generator=torch.Generator().manual_seed(seed)) * 150 * scale
    bounds = ClampBounds.of(scale, zero, 0, 255, rectified=False)
    expected = affine.fake_quantize(x, torch.tensor(scale), torch.tensor(zero), 0, 255)
    assert torch.equal(quantize_activation(x, bounds), expected)


@given(SCALES, st.integers(0, 255), st.integers(0, 1000))
def test_the_gradient_is_one_where_the_input_rounds_into_the_range_and_zero_outside(
    scale: float, zero: int, seed: int
) -> None:
    x = (torch.randn(500, generator=torch.Generator().manual_seed(seed)) * 150 * scale).requires_grad_()
    quantize_activation(x, ClampBounds.of(scale, zero, 0, 255, rectified=False)).backward(torch.full((500,), 3.0))
    assert x.grad is not None
    steps = x.detach().double() / scale
    margin = 1e-4 * (1 + steps.abs())  # the bound itself is a float32
    inside = (steps > -zero - 0.5 + margin) & (steps < 255 - zero + 0.5 - margin)
    outside = (steps < -zero - 0.5 - margin) | (steps > 255 - zero + 0.5 + margin)
    assert bool((x.grad[inside] == 3.0).all()) and bool((x.grad[outside] == 0.0).all())


def test_behind_a_relu_the_clamp_is_the_relu() -> None:
    x = torch.tensor([-1.0, -0.01, 0.0, 0.01, 1.0, 5.0, 9.0], requires_grad=True)
    bounds = ClampBounds.of(0.02, 0, 0, 255, rectified=True)
    y = quantize_activation(x, bounds)
    composed = affine.fake_quantize(torch.relu(x), torch.tensor(0.02), torch.tensor(0), 0, 255)
    assert torch.equal(y, composed)
    y.sum().backward()
    assert x.grad is not None and x.grad.tolist() == [0, 0, 0, 1, 1, 1, 0]


def saved_by(function: Callable[[], torch.Tensor]) -> list[torch.Tensor]:
    """What a function saves for backward."""
    saved: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        function()
    return saved


def test_only_the_input_is_saved_for_backward() -> None:
    x = torch.randn(10, requires_grad=True)
    saved = saved_by(lambda: quantize_activation(x, ClampBounds.of(0.1, 10, 0, 255, rectified=False)))
    assert len(saved) == 1 and saved[0].data_ptr() == x.data_ptr()


def test_a_learned_grid_saves_its_input_and_its_parameters() -> None:
    x, scale = torch.randn(10, requires_grad=True), torch.tensor(0.1, requires_grad=True)
    saved = saved_by(lambda: learned_fake_quantize(x, scale, Integers(0, 15)))
    assert [t.data_ptr() for t in saved if t.numel() > 1] == [x.data_ptr()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rectified", [False, True])
def test_one_byte_an_element_gives_the_same_gradient(rectified: bool, dtype: torch.dtype) -> None:
    bounds = ClampBounds.of(0.05, 0 if rectified else 100, 0, 255, rectified)
    x = (torch.randn(2, 3, 8, 8) * 6).to(dtype).to(memory_format=torch.channels_last)
    x[0, 0, 0] = torch.tensor([0.0, -0.0, bounds.pass_above, bounds.pass_below, 1e-8, -1e-8, 60.0, -60.0])
    grad = torch.randn_like(x)
    found = []
    for small in (False, True):
        leaf = x.clone().requires_grad_()
        y = quantize_activation(leaf, bounds, small)
        y.backward(grad)
        assert leaf.grad is not None
        found.append((y.detach(), leaf.grad))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    assert 0 < int((found[0][1] == 0).sum()) < x.numel()
    (saved,) = saved_by(lambda: quantize_activation(x.clone().requires_grad_(), bounds, small=True))
    assert saved.dtype == torch.uint8 and saved.shape == x.shape


@pytest.mark.parametrize("axis", [0, None])
def test_parameters_pass_their_gradient_unchanged(axis: int | None) -> None:
    w = torch.randn(4, 3, requires_grad=True)
    scale = affine.symmetric_scale(w, 127, axis)
    q = quantize_parameter(w, scale, -127, 127, axis)
    zero = torch.zeros_like(scale, dtype=torch.int32)
    assert torch.equal(q, affine.fake_quantize(w, scale, zero, -127, 127, axis))
    assert len((q / affine.broadcast(scale, axis, 2)).round().unique()) <= 255
    (q * torch.arange(12.0).reshape(4, 3)).sum().backward()
    assert w.grad is not None and torch.equal(w.grad, torch.arange(12.0).reshape(4, 3))


def test_a_bias_lands_on_its_int32_grid() -> None:
    bias = torch.tensor([0.3, -1.7, 100.0], requires_grad=True)
    s_x, s_w = torch.tensor(0.013), torch.tensor([0.001, 0.02, 0.3])
    q = quantize_bias(bias, s_x, s_w)
    integers = affine.quantize_bias(bias.detach(), s_x, s_w)
    assert torch.equal(q, (integers * (s_x.double() * s_w.double())).float())
    q.sum().backward()
    assert bias.grad is not None and bias.grad.tolist() == [1, 1, 1]
