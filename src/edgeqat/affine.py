"""Pure numerics of affine quantization: no state, no modules. Everything else is tested against this file.

x ~ scale * (q - zero_point), q integer in [qmin, qmax]. Integers are held in float tensors, exactly, unless a
dtype is stated. Rounding is half to even everywhere; division is true division, never multiplication by a
reciprocal, because the two differ in the last bit (127.5 against 127.49999).
"""

from __future__ import annotations

import torch
from torch import Tensor

from edgeqat.errors import InputError

__all__ = [
    "BIAS_LIMIT",
    "activation_qparams",
    "broadcast",
    "dequantize",
    "fake_quantize",
    "float_bias",
    "power_of_two_above",
    "quantize",
    "quantize_bias",
    "range_qparams",
    "scale_for_bias",
    "symmetric_scale",
]

SCALE_FLOOR = 1e-10
"""Smallest scale: a channel of zeros still gets a grid, and s_x * s_w stays a normal float32."""

BIAS_LIMIT = 2**30
"""Largest |bias| integer planned for: half of int32, so that accumulation on top of it cannot overflow."""


def broadcast(parameter: Tensor, axis: int | None, ndim: int) -> Tensor:
    """Reshapes a [C] scale or zero_point so that it broadcasts along `axis` of an ndim-dimensional tensor."""
    if axis is None:
        return parameter
    shape = [1] * ndim
    shape[axis] = -1
    return parameter.reshape(shape)


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, axis: int | None = None) -> Tensor:
    """Integers of `x` on a grid, as a float32 tensor of the same shape.

    round(clamp(x / scale, qmin - zero_point, qmax - zero_point)) + zero_point: the bounds are integers, so
    clamping before or after rounding is the same.

    >>> quantize(torch.tensor([-1.0, 0.24, 9.0]), torch.tensor(0.5), torch.tensor(2), 0, 15)
    tensor([ 0.,  2., 15.])
    """
    s = broadcast(scale, axis, x.dim())
    z = broadcast(zero_point, axis, x.dim()).to(torch.float32)
    return torch.round(torch.clamp(x / s, qmin - z, qmax - z)) + z


def dequantize(q: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None = None) -> Tensor:
    """scale * (q - zero_point) in float32.

    >>> dequantize(torch.tensor([0.0, 2.0, 15.0]), torch.tensor(0.5), torch.tensor(2))
    tensor([-1.0000,  0.0000,  6.5000])
    """
    s = broadcast(scale, axis, q.dim())
    z = broadcast(zero_point, axis, q.dim()).to(torch.float32)
    return (q - z) * s


def fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, axis: int | None = None
) -> Tensor:
    """dequantize(quantize(x)): the nearest representable point, ties to even."""
    return dequantize(quantize(x, scale, zero_point, qmin, qmax, axis), scale, zero_point, axis)


def activation_qparams(
    low: float, high: float, qmin: int, qmax: int, *, symmetric: bool = False, power_of_two: bool = False
) -> tuple[Tensor, Tensor]:
    """Scale and zero_point whose grid covers [low, high] and represents 0 exactly.

    A range of zero width (constant zero activations) gets scale 1: any grid represents it.

    Args:
        low: Lower end of the range.
        high: Upper end of the range.
        qmin: Smallest integer.
        qmax: Largest integer.
        symmetric: Fix the zero point in the middle, at (qmin + qmax + 1) / 2, and let the larger of |low| and |high|
            be (qmax - qmin) / 2 steps, as torch.ao does. An upper end that is the larger one is clipped by half a
            step, which is what rounding costs any value.
        power_of_two: Let the scale be the next power of two that is not smaller.

    Returns:
        scale (float32, 0-d) and zero_point (int32, 0-d).

    Raises:
        InputError: A bound is NaN or infinite.

    >>> activation_qparams(0.0, 5.1, 0, 255)
    (tensor(0.0200), tensor(0, dtype=torch.int32))
    >>> activation_qparams(-2.55, 1.0, 0, 255, symmetric=True)
    (tensor(0.0200), tensor(128, dtype=torch.int32))
    """
    bounds = torch.tensor([low, high], dtype=torch.float64)
    if not bool(torch.isfinite(bounds).all()):
        raise InputError(f"found the activation range [{low}, {high}], wanted finite bounds")
    return range_qparams(bounds[0], bounds[1], qmin, qmax, symmetric=symmetric, power_of_two=power_of_two)


def range_qparams(
    low: Tensor, high: Tensor, qmin: int, qmax: int, *, symmetric: bool, power_of_two: bool
) -> tuple[Tensor, Tensor]:
    """What `activation_qparams` gives, of finite bounds that are float64 tensors, 0-d; nothing waits for a device."""
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    if symmetric:
        high = torch.maximum(-low, high)
        low = -high
    width = ((high - low) / (qmax - qmin)).clamp(min=SCALE_FLOOR)
    scale = torch.where(high > low, width, torch.ones_like(width)).to(torch.float32)
    scale = power_of_two_above(scale) if power_of_two else scale
    if symmetric:
        # (qmin + qmax) / 2 would lie between two integers: the upper one is torch.ao's.
        return scale, torch.full_like(scale, float((qmin + qmax + 1) // 2), dtype=torch.int32)
    return scale, torch.round(qmin - low / scale.double()).clamp(qmin, qmax).to(torch.int32)


def power_of_two_above(scale: Tensor) -> Tensor:
    """The smallest powers of two that are not below positive scales, exactly; float32, the same shape.

    >>> power_of_two_above(torch.tensor([0.25, 0.3]))
    tensor([0.2500, 0.5000])
    """
    mantissa, _ = torch.frexp(scale)  # scale = mantissa * 2**exponent, 0.5 <= mantissa < 1, so the quotient is exact
    return torch.where(mantissa == 0.5, scale, scale / mantissa)


def symmetric_scale(w: Tensor, qmax: int, axis: int | None, floor: Tensor | None = None) -> Tensor:
    """Scale of the symmetric grid whose largest integer is the largest |w|, per channel of `axis` or whole.

    Args:
        w: Weights, any shape.
        qmax: Largest integer, e.g. 127.
        axis: Channel dimension, or None for one scale.
        floor: Smallest scale allowed, broadcastable to the result; SCALE_FLOOR where None.

    Returns:
        float32, [C] or 0-d.
    """
    dims = [d for d in range(w.dim()) if d != axis]
    largest = w.detach().abs().amax(dim=dims) if dims else w.detach().abs()
    scale = largest.to(torch.float32) / qmax
    return scale.clamp_min(SCALE_FLOOR) if floor is None else torch.maximum(scale, floor)


def quantize_bias(bias: Tensor, input_scale: Tensor, weight_scale: Tensor) -> Tensor:
    """round(bias / (input_scale * weight_scale)), in float64, half to even.

    The product of the two float32 scales is exact in float64, so the only rounding is the one to an integer
    (and that of the division, 2**-53).

    Args:
        bias: float32 [C].
        input_scale: float32, 0-d.
        weight_scale: float32, [C] or 0-d.

    Returns:
        Integers in a float64 [C] tensor.
    """
    return torch.round(bias.double() / (input_scale.double() * weight_scale.double()))


def scale_for_bias(bias: Tensor, input_scale: Tensor) -> Tensor:
    """The smallest weight scale at which `bias` fits int32 with a bit to spare; float32 [C].

    Args:
        bias: float32 [C].
        input_scale: float32, 0-d.
    """
    scale = (bias.double().abs() / (input_scale.double() * BIAS_LIMIT)).to(torch.float32)
    # The rounding to float32 may have been downwards, to where the bias does not fit.
    return torch.where(scale > 0, torch.nextafter(scale, torch.full_like(scale, float("inf"))), scale)


def float_bias(bias: Tensor, input_scale: Tensor, weight_scale: Tensor) -> Tensor:
    """The float32 [C] bias that stands for integers at scale input_scale * weight_scale, for kernels that want one.

    Args:
        bias: int32 [C].
        input_scale: float32, 0-d.
        weight_scale: float32, [C] or 0-d.
    """
    product = input_scale * weight_scale  # rounded to float32, as the kernels do
    return (bias.double() * product.double()).to(torch.float32)
