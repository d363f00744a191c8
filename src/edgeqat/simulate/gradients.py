"""Fake quantization as autograd functions of our own.

They save only their input, run in place on one buffer, and their lower clamp *is* the ReLU, so that quantizing
every value costs about what the ReLU did. Gradients are the straight-through estimator with clipping: 1 inside
the range, 0 outside (Bengio et al. 2013, arXiv:1308.3432; Jacob et al. 2018, arXiv:1712.05877).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from edgeqat import affine

__all__ = ["ClampBounds", "quantize_activation", "quantize_bias", "quantize_parameter"]


@dataclass(frozen=True)
class ClampBounds:
    """A frozen per-tensor grid as Python numbers, so that no training step waits for the device.

    Attributes:
        scale: Exactly a float32.
        low: qmin - zero_point.
        high: qmax - zero_point.
        pass_above: The gradient passes for inputs strictly above this ...
        pass_below: ... and strictly below this.
    """

    scale: float
    low: float
    high: float
    pass_above: float
    pass_below: float

    @staticmethod
    def of(scale: float, zero_point: int, qmin: int, qmax: int, rectified: bool) -> ClampBounds:
        """Bounds of a grid. An input that rounds into the range passes its gradient; behind a ReLU, one above 0."""
        low, high = float(qmin - zero_point), float(qmax - zero_point)
        pass_above = 0.0 if rectified else (low - 0.5) * scale
        return ClampBounds(scale, low, high, pass_above, (high + 0.5) * scale)


class _QuantizeActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bounds: ClampBounds) -> Tensor:
        ctx.save_for_backward(x)
        ctx.bounds = bounds
        # The zero point cancels: (round(x / s) + z clamped - z) * s.
        return x.div(bounds.scale).round_().clamp_(bounds.low, bounds.high).mul_(bounds.scale)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, None]:
        (x,) = ctx.saved_tensors
        # One fused pass over the gradient: it is hardtanh's, 1 strictly between the bounds.
        grad = torch.ops.aten.hardtanh_backward(grad_outputs[0], x, ctx.bounds.pass_above, ctx.bounds.pass_below)
        return grad, None


class _QuantizeParameter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parameter: Tensor, quantized: Tensor) -> Tensor:
        return quantized

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return grad_outputs[0], None


def quantize_activation(x: Tensor, bounds: ClampBounds) -> Tensor:
    """The nearest point of the grid, in float32; equals `affine.fake_quantize` with the same grid.

    Args:
        x: float32, any shape.
        bounds: The grid.
    """
    result: Tensor = _QuantizeActivation.apply(x, bounds)  # type: ignore[no-untyped-call]
    return result


def quantize_parameter(parameter: Tensor, scale: Tensor, qmin: int, qmax: int, axis: int | None) -> Tensor:
    """A parameter on its symmetric grid; the gradient passes unchanged, for nothing is clipped."""
    with torch.no_grad():
        zero = torch.zeros_like(scale, dtype=torch.int32)
        quantized = affine.fake_quantize(parameter, scale, zero, qmin, qmax, axis)
    result: Tensor = _QuantizeParameter.apply(parameter, quantized)  # type: ignore[no-untyped-call]
    return result


def quantize_bias(bias: Tensor, input_scale: Tensor, weight_scale: Tensor) -> Tensor:
    """A bias rounded to int32 at input_scale * weight_scale, in float32; the gradient passes unchanged."""
    with torch.no_grad():
        step = input_scale.double() * weight_scale.double()
        quantized = (affine.quantize_bias(bias, input_scale, weight_scale) * step).to(bias.dtype)
    result: Tensor = _QuantizeParameter.apply(bias, quantized)  # type: ignore[no-untyped-call]
    return result
