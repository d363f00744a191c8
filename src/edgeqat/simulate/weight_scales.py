"""Scales of weights: from the largest one, or from a search for what is better clipped. Pure functions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from edgeqat import affine
from edgeqat.errors import PlanError

__all__ = ["weight_scale"]


def weight_scale(weight: Tensor, observer: str, qmax: int, axis: int | None, percentile: float = 99.99) -> Tensor:
    """The scale of a weight's symmetric grid -qmax .. qmax, per channel of `axis` or whole.

    - "minmax": the largest |w| / qmax, so that nothing is clipped.
    - "percentile": the largest |w| / qmax once the largest are left out, 0.01 % of them by default (rounded down:
      channels of less than 10,000 weights keep all). A channel in which only those are not zero keeps them.
    - "mse": the scale with the smallest squared error, by search: 64 even steps up to that of "minmax", finer ones
      around the best, and powers of two down to 1/4096. That of "minmax" is among them, so the error is never
      larger. (Banner et al. 2019 derive the scale for known distributions; this takes the weights as they are.)

    Args:
        weight: Finite weights, any shape.
        observer: "minmax", "mse" or "percentile".
        qmax: Largest integer, e.g. 127.
        axis: Channel dimension, or None for one scale.
        percentile: Per cent of the weights that "percentile" keeps at least.

    Returns:
        float32, [C] or 0-d; never below affine.SCALE_FLOOR.

    Raises:
        PlanError: The observer is unknown.
    """
    weight = weight.detach()
    largest = affine.symmetric_scale(weight, qmax, axis)
    if observer == "minmax":
        return largest
    if observer not in ("percentile", "mse"):
        raise PlanError(f"found the weight observer {observer!r}, wanted one of minmax, mse, percentile")
    channels = weight.reshape(1, -1) if axis is None else weight.movedim(axis, 0).flatten(1)
    if observer == "percentile":
        return _percentile(channels.float(), largest.reshape(-1), qmax, percentile).reshape(largest.shape)
    return _least_squares(channels.float(), largest.reshape(-1), qmax).reshape(largest.shape)


def _percentile(channels: Tensor, largest: Tensor, qmax: int, percentile: float) -> Tensor:
    """channels [C, K], largest [C] -> scales [C]."""
    n = channels.shape[1]
    kept = n - math.floor(n * (100.0 - percentile) / 100.0)
    quantile = channels.abs().kthvalue(kept, dim=1).values
    return torch.where(quantile > 0.0, quantile / qmax, largest).clamp_min(affine.SCALE_FLOOR)


def _least_squares(channels: Tensor, largest: Tensor, qmax: int) -> Tensor:
    """channels [C, K], largest [C] -> scales [C]; each channel searches on its own, all in step."""
    shares, errors = torch.ones_like(largest), _squared_errors(channels, largest, qmax)

    def try_out(candidates: Tensor) -> None:
        """Shares of the largest scale, [C]."""
        nonlocal shares, errors
        candidates = candidates.clamp(0.0, 1.0)
        found = _squared_errors(channels, largest * candidates, qmax)
        better = found < errors
        shares, errors = torch.where(better, candidates, shares), torch.where(better, found, errors)

    # Few weights have a jagged error with many minima, so that no descent finds the best one.
    for share in [i / 64 for i in range(63, 0, -1)] + [2.0**-i for i in range(7, 13)]:
        try_out(torch.full_like(largest, share))
    for step in (1 / 128, 1 / 256):
        around = shares
        try_out(around - step)
        try_out(around + step)
    return (largest * shares).clamp_min(affine.SCALE_FLOOR)


def _squared_errors(channels: Tensor, scales: Tensor, qmax: int) -> Tensor:
    """The squared error of each channel on the grid of its scale, summed in float64: [C, K], [C] -> [C]."""
    zero = torch.zeros_like(scales, dtype=torch.int32)
    error = affine.fake_quantize(channels, scales.clamp_min(affine.SCALE_FLOOR), zero, -qmax, qmax, axis=0) - channels
    return error.double().square().sum(dim=1)
