"""Fake quantization as autograd functions of our own.

They save only what backward needs, run in place on one buffer, and their lower clamp *is* the ReLU, so that
quantizing every value costs about what the ReLU did. What a learned grid can compute again from its input it does not
save; where even the input is saved by nobody else, a byte an element says where the gradient passes. Arithmetic is
float32 whatever the input's dtype; the result has the input's.

Gradients, with v = x / scale + zero_point and q = round(v):

    straight-through, clipped     d/dx = 1 where q is in [qmin, qmax], else 0
    learned step size (LSQ)       d/dx = 1 where qmin < v < qmax, else 0
                                  d/dscale = q - v inside; qmin - zero_point below; qmax - zero_point above
    learned offset (LSQ+)         the grid is anchored at offset = -zero_point * scale:
                                  d/dscale = q - v inside; qmin below; qmax above
                                  d/doffset = 0 inside; 1 outside

Sources: Bengio et al. 2013 (arXiv:1308.3432), Jacob et al. 2018 (arXiv:1712.05877) for the first; Esser et al. 2020
(arXiv:1902.08153), section 2.1 and 2.2 for LSQ and the factor on its gradient; Bhalgat et al. 2020
(arXiv:2004.09576), section 3.1 for LSQ+.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from edgeqat import affine

__all__ = [
    "ClampBounds",
    "Integers",
    "fake_quantize",
    "learned_fake_quantize",
    "learned_parameter",
    "lsq_factor",
    "offset_zero_point",
    "quantize_activation",
    "quantize_bias",
    "quantize_parameter",
    "straight_through",
]


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


@dataclass(frozen=True)
class Integers:
    """The integers of a grid, and the channel dimension of its scales; `axis` None means one scale."""

    qmin: int
    qmax: int
    axis: int | None = None


class _QuantizeActivation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: float, low: float, high: float, above: float, below: float, small: bool
    ) -> Tensor:
        ctx.save_for_backward(_passes(x, above, below) if small else x)
        ctx.bounds, ctx.small = (above, below), small
        # The zero point cancels: (round(x / s) + z clamped - z) * s. In float32 x.float() is x itself.
        return x.float().div(scale).round_().clamp_(low, high).mul_(scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (saved,), grad = ctx.saved_tensors, grad_outputs[0]
        if ctx.small:
            passed = saved.to(grad.dtype).mul_(grad)
        else:
            # One fused pass over the gradient: it is hardtanh's, 1 strictly between the bounds.
            passed = torch.ops.aten.hardtanh_backward(grad, saved, *ctx.bounds)
        return passed, None, None, None, None, None, None


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, axis: Any) -> Tensor:
        s, z = _broadcast(x, scale, zero_point, axis)
        rounded = x.float().div(s).round_().add_(z)
        ctx.save_for_backward((rounded >= qmin) & (rounded <= qmax))
        return rounded.clamp_(qmin, qmax).sub_(z).mul_(s).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (inside,) = ctx.saved_tensors
        return grad_outputs[0] * inside, None, None, None, None, None


class _LearnedFakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, offset: Tensor | None, qmin: int, qmax: int, axis: Any
    ) -> Tensor:
        s, z = _broadcast(x, scale, zero_point, axis)
        ctx.qmin, ctx.qmax, ctx.axis, ctx.has_offset = qmin, qmax, axis, offset is not None
        ctx.save_for_backward(x, scale, zero_point)
        return _nearest(x, s, qmin - z, qmax - z)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (x, scale, zero_point), grad, axis = ctx.saved_tensors, grad_outputs[0], ctx.axis
        s, z = _broadcast(x, scale, zero_point, axis)
        quantized = _nearest(x, s, ctx.qmin - z, ctx.qmax - z)
        # With g the gradient and g' what passes:  sum g * (x^ - x') / s, x' = x inside and 0 outside, since there
        # x^ / s is qmin - z or qmax - z. Two dot products, which read what is there and write nothing; their float32
        # rounding is some 1e-4 of the gradient of two million values, far below the noise of a batch.
        passed = _pass_between(grad, x, (ctx.qmin - z) * s, (ctx.qmax - z) * s)
        total = (_dot(grad, quantized, axis) - _dot(passed, x, axis)) / scale
        if not ctx.has_offset:
            return passed, total, None, None, None, None, None
        outside = _dot(grad, None, axis) - _dot(passed, None, axis)
        return passed, total + outside * zero_point, None, outside, None, None, None


class _LearnedParameter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parameter: Tensor, low: Tensor, high: Tensor, factor: float) -> Tensor:
        ctx.save_for_backward(parameter, low, high)
        ctx.factor = factor
        return parameter.clamp(low, high)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        parameter, low, high = ctx.saved_tensors
        grad = grad_outputs[0]
        outward = ((parameter <= low) & (grad > 0)) | ((parameter >= high) & (grad < 0))
        return grad.masked_fill(outward, 0.0) * ctx.factor, None, None, None


class _QuantizeParameter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parameter: Tensor, quantized: Tensor) -> Tensor:
        return quantized

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return grad_outputs[0], None


def _broadcast(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None) -> tuple[Tensor, Tensor]:
    return affine.broadcast(scale, axis, x.dim()), affine.broadcast(zero_point.float(), axis, x.dim())


def _nearest(x: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """round(x / scale), no less than low and no more than high, times scale; in x's dtype."""
    return x.float().div(scale).round_().clamp_(low, high).mul_(scale).to(x.dtype)


def _passes(x: Tensor, above: float, below: float) -> Tensor:
    """uint8, x's shape: 1 where above < x < below, else 0. Two comparisons and an "and" take half as long again."""
    one = torch.ones((), dtype=x.dtype, device=x.device).expand_as(x)
    return torch.ops.aten.hardtanh_backward(one, x, above, below).to(torch.uint8)  # type: ignore[no-any-return]


def _pass_between(grad: Tensor, x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The gradient where low < x < high, else 0."""
    if low.dim() == 0 and low.device.type == "cpu" and not torch.compiler.is_compiling():
        return torch.ops.aten.hardtanh_backward(grad, x, float(low), float(high))  # type: ignore[no-any-return]
    return torch.where((x > low) & (x < high), grad, torch.zeros((), dtype=grad.dtype, device=grad.device))


def _dot(a: Tensor, b: Tensor | None, axis: int | None) -> Tensor:
    """Sum of a * b (of a, without b) in float32: of everything, or for each index of `axis`."""
    if axis is None and b is not None and a.dtype == b.dtype == torch.float32:
        order = torch.channels_last if _is_channels_last(a) and _is_channels_last(b) else torch.contiguous_format
        return torch.dot(_in_memory_order(a, order), _in_memory_order(b, order))
    product = a.float() if b is None else a.float() * b.float()
    return product.sum([d for d in range(a.dim()) if d != axis])


def _is_channels_last(x: Tensor) -> bool:
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)


def _in_memory_order(x: Tensor, order: torch.memory_format) -> Tensor:
    """A view as [numel] where the memory has that order, else a copy."""
    return (x.permute(0, 2, 3, 1) if order is torch.channels_last else x).reshape(-1)


def quantize_activation(x: Tensor, bounds: ClampBounds, small: bool = False) -> Tensor:
    """The nearest point of a frozen grid, in x's dtype; in float32 it equals `affine.fake_quantize` on that grid.

    Args:
        x: Floating point, any shape.
        bounds: The grid.
        small: Save a byte an element for backward instead of x; it costs time, and less memory unless the op before
            saves x too.
    """
    result: Tensor = _QuantizeActivation.apply(  # type: ignore[no-untyped-call]
        x, bounds.scale, bounds.low, bounds.high, bounds.pass_above, bounds.pass_below, small
    )
    return result


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, integers: Integers) -> Tensor:
    """The nearest point of any affine grid, with the clipped straight-through gradient for x alone.

    Args:
        x: Floating point, any shape.
        scale: float32, 0-d, or [C] with `integers.axis`.
        zero_point: int32, same shape.
        integers: The grid's integers, signed or unsigned, of any width.

    >>> x = torch.tensor([-2.0, 0.3, 9.0], requires_grad=True)
    >>> y = fake_quantize(x, torch.tensor(0.5), torch.tensor(1), Integers(0, 15))
    >>> y.detach(), torch.autograd.grad(y.sum(), x)[0]
    (tensor([-0.5000,  0.5000,  7.0000]), tensor([0., 1., 0.]))
    """
    result: Tensor = _FakeQuantize.apply(  # type: ignore[no-untyped-call]
        x, scale, zero_point, integers.qmin, integers.qmax, integers.axis
    )
    return result


def learned_fake_quantize(x: Tensor, scale: Tensor, integers: Integers, offset: Tensor | None = None) -> Tensor:
    """The nearest point of a grid whose scale, and perhaps offset, are learned; the formulas stand above.

    Args:
        x: Floating point, any shape.
        scale: float32, 0-d or [C], above 0: a parameter behind `learned_parameter`.
        integers: The grid's integers.
        offset: float32 of scale's shape, the real value of integer 0 (LSQ+); without it the zero point is 0, or
            `integers.qmin` if that is above 0.
    """
    with torch.no_grad():
        zero_point = offset_zero_point(scale, offset, integers)
    result: Tensor = _LearnedFakeQuantize.apply(  # type: ignore[no-untyped-call]
        x, scale, zero_point, offset, integers.qmin, integers.qmax, integers.axis
    )
    return result


def learned_parameter(parameter: Tensor, low: Tensor, high: Tensor, factor: float) -> Tensor:
    """A learned scale or offset as the forward pass uses it: inside [low, high].

    Args:
        parameter: float32, 0-d or [C].
        low: Its smallest value; same shape, or 0-d.
        high: Its largest value; same shape, or 0-d.
        factor: On its gradient, which is 0 where it would lead further out of the range.
    """
    result: Tensor = _LearnedParameter.apply(parameter, low, high, factor)  # type: ignore[no-untyped-call]
    return result


def offset_zero_point(scale: Tensor, offset: Tensor | None, integers: Integers) -> Tensor:
    """The integer of 0.0 on a learned grid: round(-offset / scale), in range; int32, scale's shape."""
    if offset is None:
        return torch.full_like(scale, float(max(integers.qmin, 0)), dtype=torch.int32)
    return torch.round(-offset / scale).clamp(integers.qmin, integers.qmax).to(torch.int32)


def lsq_factor(n: int, integers: Integers) -> float:
    """The factor on a learned scale's gradient, 1 / sqrt(n * qmax).

    Args:
        n: Weights that share the scale; of an activation, its features (its size without the batch).
        integers: The grid's integers.

    Source: Esser et al. 2020 (arXiv:1902.08153), section 2.2.
    """
    return float((n * integers.qmax) ** -0.5)


def quantize_parameter(parameter: Tensor, scale: Tensor, qmin: int, qmax: int, axis: int | None) -> Tensor:
    """A parameter on its symmetric grid; the gradient passes unchanged, for nothing is clipped."""
    with torch.no_grad():
        zero = torch.zeros_like(scale, dtype=torch.int32)
        quantized = affine.fake_quantize(parameter, scale, zero, qmin, qmax, axis)
    result: Tensor = _QuantizeParameter.apply(parameter, quantized)  # type: ignore[no-untyped-call]
    return result


def straight_through(parameter: Tensor, quantized: Tensor) -> Tensor:
    """`quantized` forward, and its gradient unchanged for `parameter`, of which nothing is clipped."""
    result: Tensor = _QuantizeParameter.apply(parameter, quantized)  # type: ignore[no-untyped-call]
    return result


def quantize_bias(bias: Tensor, input_scale: Tensor, weight_scale: Tensor) -> Tensor:
    """A bias rounded to int32 at input_scale * weight_scale, in float32; the gradient passes unchanged."""
    with torch.no_grad():
        step = input_scale.double() * weight_scale.double()
        quantized = (affine.quantize_bias(bias, input_scale, weight_scale) * step).to(bias.dtype)
    result: Tensor = _QuantizeParameter.apply(bias, quantized)  # type: ignore[no-untyped-call]
    return result
