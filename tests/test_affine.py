"""Properties of the numerics, against torch's own fake quantization and against plain Python."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from edgeqat import affine
from edgeqat.errors import InputError

SCALES = st.floats(2**-20, 2**10, width=32)
BITS = st.integers(2, 8)


@st.composite
def grids(draw: st.DrawFn) -> tuple[Tensor, Tensor, int, int]:
    bits = draw(BITS)
    signed = draw(st.booleans())
    qmin, qmax = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    zero = draw(st.integers(qmin, qmax))
    return torch.tensor(draw(SCALES)), torch.tensor(zero, dtype=torch.int32), qmin, qmax


def reals(scale: Tensor, seed: int, n: int = 200) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed)) * 100 * scale


@given(grids())
def test_every_representable_point_is_a_fixed_point(grid: tuple[Tensor, Tensor, int, int]) -> None:
    scale, zero, qmin, qmax = grid
    q = torch.arange(qmin, qmax + 1).float()
    x = affine.dequantize(q, scale, zero)
    assert torch.equal(affine.quantize(x, scale, zero, qmin, qmax), q)


@given(grids(), st.integers(0, 1000))
def test_fake_quantization_is_idempotent_monotone_and_keeps_zero(
    grid: tuple[Tensor, Tensor, int, int], seed: int
) -> None:
    scale, zero, qmin, qmax = grid
    x = reals(scale, seed).sort().values
    once = affine.fake_quantize(x, scale, zero, qmin, qmax)
    assert torch.equal(affine.fake_quantize(once, scale, zero, qmin, qmax), once)
    assert bool((once.diff() >= 0).all())
    assert float(affine.fake_quantize(torch.zeros(1), scale, zero, qmin, qmax)) == 0.0


@given(grids(), st.integers(0, 1000))
def test_the_error_inside_the_range_is_at_most_half_a_step(grid: tuple[Tensor, Tensor, int, int], seed: int) -> None:
    scale, zero, qmin, qmax = grid
    low, high = (qmin - int(zero)) * float(scale), (qmax - int(zero)) * float(scale)
    x = reals(scale, seed).clamp(low, high)
    error = (affine.fake_quantize(x, scale, zero, qmin, qmax) - x).abs().double()
    # One float32 rounding in the division and one in the product, each relative to at most 256 steps.
    assert bool((error <= float(scale) * (0.5 + 256 * 2 * 2**-24)).all())


@given(grids(), st.integers(0, 1000))
def test_it_equals_torch_where_the_division_is_exact(grid: tuple[Tensor, Tensor, int, int], seed: int) -> None:
    """torch multiplies by 1 / scale; for a power of two that is the same number."""
    scale, zero, qmin, qmax = grid
    scale = torch.tensor(2.0 ** round(math.log2(float(scale))))
    x = reals(scale, seed)
    expected = torch.fake_quantize_per_tensor_affine(x, scale, zero, qmin, qmax)
    assert torch.equal(affine.fake_quantize(x, scale, zero, qmin, qmax), expected)


def test_division_is_true_division() -> None:
    """127.5 rounds to 128; its product with the rounded reciprocal is below 127.5 and rounds to 127."""
    found = 0
    for step in range(1, 2000):
        scale = torch.tensor(step / 7777.0)
        x = scale * 127.5
        if float(x / scale) == 127.5 and float(x * (1 / scale)) < 127.5:
            found += 1
            assert float(affine.quantize(x, scale, torch.tensor(0), 0, 255)) == 128.0
    assert found > 0


@given(st.integers(0, 1000), st.integers(1, 6), BITS)
def test_per_channel_equals_a_loop_of_per_tensor(seed: int, channels: int, bits: int) -> None:
    w = torch.randn(channels, 3, 2, generator=torch.Generator().manual_seed(seed))
    limit = 2 ** (bits - 1) - 1
    scale = affine.symmetric_scale(w, limit, 0)
    zero = torch.zeros(channels, dtype=torch.int32)
    together = affine.quantize(w, scale, zero, -limit, limit, 0)
    for c in range(channels):
        alone = affine.symmetric_scale(w[c], limit, None)
        assert torch.equal(alone, scale[c])
        assert torch.equal(affine.quantize(w[c], alone, torch.tensor(0), -limit, limit), together[c])
    assert int(together.abs().max()) == limit


@given(st.floats(-1e4, 1e4), st.floats(-1e4, 1e4), BITS)
def test_a_grid_covers_its_range_within_half_a_step_and_represents_zero(a: float, b: float, bits: int) -> None:
    low, high = min(a, b), max(a, b)
    assume(high - low > 1e-6 and max(abs(a), abs(b)) > 1e-6)
    scale, zero = affine.activation_qparams(low, high, 0, 2**bits - 1)
    assert scale.dtype == torch.float32 and zero.dtype == torch.int32
    assert 0 <= int(zero) <= 2**bits - 1
    step = float(scale) * (0.5 + 1e-4)
    assert (0 - int(zero)) * float(scale) <= min(low, 0.0) + step
    assert (2**bits - 1 - int(zero)) * float(scale) >= max(high, 0.0) - step
    if low >= 0:
        assert int(zero) == 0


def test_constant_zero_activations_get_a_legal_grid() -> None:
    scale, zero = affine.activation_qparams(0.0, 0.0, 0, 255)
    assert (float(scale), int(zero)) == (1.0, 0)


@pytest.mark.parametrize("bounds", [(math.nan, 1.0), (0.0, math.inf), (-math.inf, 0.0)], ids=str)
def test_a_range_that_is_not_finite_is_refused(bounds: tuple[float, float]) -> None:
    with pytest.raises(InputError, match="wanted finite bounds"):
        affine.activation_qparams(*bounds, 0, 255)


def test_a_channel_of_zeros_still_has_a_scale() -> None:
    scale = affine.symmetric_scale(torch.tensor([[0.0, 0.0], [1.0, -2.54]]), 127, 0)
    assert float(scale[0]) == pytest.approx(affine.SCALE_FLOOR)
    assert float(scale[1]) == pytest.approx(0.02)


@settings(max_examples=200)
@given(st.floats(-100, 100, width=32), SCALES, SCALES)
def test_a_bias_is_rounded_in_float64(bias: float, s_x: float, s_w: float) -> None:
    found = affine.quantize_bias(torch.tensor([bias]), torch.tensor(s_x), torch.tensor([s_w]))
    assert float(found) == round(bias / (s_x * s_w))  # Python floats are float64, and round is half to even
