from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from edgeqat import affine
from edgeqat.errors import PlanError
from edgeqat.simulate.weight_scales import weight_scale

WEIGHT = torch.randn(6, 32, 3, 3, generator=torch.Generator().manual_seed(0)) ** 3
AXES = pytest.mark.parametrize("axis", [0, 1, None])


def errors(weight: Tensor, scale: Tensor, qmax: int, axis: int | None) -> Tensor:
    """Squared errors by channel, or of the whole."""
    zero = torch.zeros_like(scale, dtype=torch.int32)
    error = (affine.fake_quantize(weight, scale, zero, -qmax, qmax, axis) - weight).double() ** 2
    return error.sum() if axis is None else error.movedim(axis, 0).flatten(1).sum(1)


@AXES
def test_minmax_is_the_scale_that_clips_nothing(axis: int | None) -> None:
    assert torch.equal(weight_scale(WEIGHT, "minmax", 127, axis), affine.symmetric_scale(WEIGHT, 127, axis))


@AXES
@pytest.mark.parametrize("qmax", [127, 7, 1])
def test_no_scale_of_a_dense_grid_has_a_smaller_squared_error(axis: int | None, qmax: int) -> None:
    scale = weight_scale(WEIGHT, "mse", qmax, axis)
    largest = affine.symmetric_scale(WEIGHT, qmax, axis)
    assert scale.dtype == torch.float32 and scale.shape == largest.shape
    found = errors(WEIGHT, scale, qmax, axis)
    best = torch.stack([errors(WEIGHT, largest * i / 200, qmax, axis) for i in range(1, 201)]).amin(0)
    # The error is jagged: between two steps of the search lies now and then a slightly smaller one.
    assert bool((found <= best * 1.02).all())


@AXES
@pytest.mark.parametrize("qmax", [7, 1])
def test_with_few_bits_normal_weights_are_worth_clipping(axis: int | None, qmax: int) -> None:
    weight = torch.randn(6, 32, 3, 3)
    largest = affine.symmetric_scale(weight, qmax, axis)
    clipped = errors(weight, weight_scale(weight, "mse", qmax, axis), qmax, axis)
    assert float(clipped.sum()) < 0.9 * float(errors(weight, largest, qmax, axis).sum())


@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=2, max_size=24),
    st.sampled_from([127, 7, 1]),
    st.sampled_from(["minmax", "mse", "percentile"]),
)
def test_scales_are_legal_and_mse_is_never_worse_than_minmax(values: list[float], qmax: int, observer: str) -> None:
    weight = torch.tensor(values[: len(values) // 2 * 2]).view(2, -1)
    scale = weight_scale(weight, observer, qmax, 0)
    assert bool(torch.isfinite(scale).all()) and bool((scale >= affine.SCALE_FLOOR * (1 - 1e-6)).all())
    largest = affine.symmetric_scale(weight, qmax, 0)
    assert bool((scale <= largest).all())
    if observer == "mse":
        assert bool((errors(weight, scale, qmax, 0) <= errors(weight, largest, qmax, 0)).all())


def test_a_percentile_leaves_out_one_in_ten_thousand() -> None:
    weight = torch.arange(1.0, 20001.0).flip(0).view(1, -1)
    assert float(weight_scale(weight, "percentile", 127, 0)) == pytest.approx(19998 / 127)
    assert float(weight_scale(weight, "percentile", 127, None)) == pytest.approx(19998 / 127)
    few = weight[:, :9999]
    assert torch.equal(weight_scale(few, "percentile", 127, 0), affine.symmetric_scale(few, 127, 0))


def test_what_is_nearly_all_zero_keeps_its_largest_weight() -> None:
    weight = torch.zeros(2, 20000)
    weight[0, 5] = -2.54
    found = weight_scale(weight, "percentile", 127, 0)
    assert torch.equal(found, torch.tensor([2.54 / 127, affine.SCALE_FLOOR]))


def test_an_unknown_observer_is_refused() -> None:
    with pytest.raises(PlanError, match="found the weight observer 'histogram', wanted one of minmax, mse"):
        weight_scale(WEIGHT, "histogram", 127, 0)
