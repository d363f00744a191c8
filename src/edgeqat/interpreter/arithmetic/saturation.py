"""Sums of u8 * s8 products as AVX2 adds them: in pairs, in 16 bits with saturation, and the pairs in 32 bits.

    acc = sum over pairs of clamp(q_a * w_a + q_b * w_b, -2**15, 2**15 - 1) - z_x * sum(w)

q is the stored integer; padding holds the zero point. Pairs are products 0 and 1, 2 and 3, ... in the order [kernel
position][channel of the group], over the edges of positions; the last one of an odd number is alone. A depthwise conv
adds in 32 bits. A transposed conv is the conv that it is spelled as: mirrored, over an input that was spread out.

Two weights of different signs never saturate: 255 * 127 < 2**15.
"""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from edgeqat.op_attrs import Attrs, ConvAttrs, ConvTransposeAttrs
from edgeqat.program import Grid

__all__ = ["saturating_pairs", "saturation"]

LOW, HIGH = -(2**15), 2**15 - 1


def saturating_pairs(weight: Tensor, attrs: Attrs, qmax: int) -> Tensor:
    """Which pairs of products saturate for some inputs 0 .. qmax; exact, not a bound.

    Args:
        weight: Integers of a conv, transposed conv or linear, in the parameter's shape.
        attrs: Of the op.
        qmax: The largest integer of its input.

    Returns:
        bool, [C_out, pairs].
    """
    if isinstance(attrs, ConvTransposeAttrs):
        weight = _mirrored(weight)
    w = _ordered(weight)
    w = F.pad(w, (0, w.shape[1] % 2)).reshape(len(w), -1, 2) * qmax
    found = (w.clamp(min=0).sum(2) > HIGH) | (w.clamp(max=0).sum(2) < LOW)
    depthwise = isinstance(attrs, ConvAttrs) and weight.shape[1] == 1 and weight.shape[0] == attrs.groups
    return torch.zeros_like(found) if depthwise else found


def saturation(q: Tensor, grid: Grid, weight: Tensor, attrs: Attrs) -> Tensor | None:
    """What saturation adds to the exact accumulators of a conv, transposed conv or linear.

    Args:
        q: Integers of the input in float32: [N, C, ...], or [..., K] of a linear.
        grid: Theirs.
        weight: Integers in float32 or float64, in the parameter's shape.
        attrs: Of the op.

    Returns:
        float64, in the shape of the accumulators ([N, C_out] of a linear); None where no pair can saturate.
    """
    pairs = saturating_pairs(weight, attrs, grid.qmax)
    if not bool(pairs.any()):
        return None
    zero_point = float(grid.per_tensor()[1])
    if isinstance(attrs, ConvTransposeAttrs):
        weight, q = _mirrored(weight), _spread(q, weight, attrs, zero_point)
        attrs = ConvAttrs((1,) * len(attrs.stride), (), attrs.dilation, 1)
    elif isinstance(attrs, ConvAttrs):
        q = F.pad(q, [side for pair in reversed(attrs.padding) for side in pair], value=zero_point)
    else:
        q = q.flatten(0, -2)
        attrs = ConvAttrs((), (), (), 1)
    return _excess(q, weight, attrs, pairs)


def _ordered(weight: Tensor) -> Tensor:
    """[C_out, C, ...] to float32 [C_out, K] in the order of the products."""
    return weight.movedim(1, -1).flatten(1).to(torch.float32)


def _mirrored(weight: Tensor) -> Tensor:
    """The weight of the conv that a transposed conv is."""
    return weight.flip(list(range(2, weight.dim()))).transpose(0, 1)


def _spread(q: Tensor, weight: Tensor, a: ConvTransposeAttrs, zero_point: float) -> Tensor:
    """The input of the conv that a transposed conv is: zero points between its elements, and around them."""
    sizes = [n * step for n, step in zip(q.shape[2:], a.stride, strict=True)]
    spread = q.new_full((*q.shape[:2], *sizes), zero_point)
    spread[tuple(slice(None, None, step) for step in (1, 1, *a.stride))] = q
    before = [d * (k - 1) - p for d, k, p in zip(a.dilation, weight.shape[2:], a.padding, strict=True)]
    after = [b + more - (step - 1) for b, more, step in zip(before, a.output_padding, a.stride, strict=True)]
    sides = [side for pair in reversed(list(zip(before, after, strict=True))) for side in pair]
    return F.pad(spread, sides, value=zero_point)  # a negative side is cut off


def _excess(q: Tensor, weight: Tensor, a: ConvAttrs, pairs: Tensor) -> Tensor:
    """The sum over pairs of what clamping changes, by the few that can saturate; q is padded already."""
    kernel, channels = weight.shape[2:], weight.shape[1]
    reach = [d * (k - 1) for d, k in zip(a.dilation, kernel, strict=True)]
    sizes = [(n - r - 1) // s + 1 for n, r, s in zip(q.shape[2:], reach, a.stride, strict=True)]
    positions = list(itertools.product(*(range(k) for k in kernel)))
    w, outs = _ordered(weight), weight.shape[0] // a.groups
    total = torch.zeros(len(q) * math.prod(sizes), weight.shape[0], dtype=torch.float64)

    def inputs(index: int, group: int) -> Tensor:
        """What one weight of a group is multiplied with, at every place of every sample: [N * places]."""
        position, channel = positions[index // channels], group * channels + index % channels
        steps = zip(position, a.dilation, a.stride, sizes, strict=True)
        window = [slice(at * d, at * d + (n - 1) * s + 1, s) for at, d, s, n in steps]
        return q.select(1, channel)[(slice(None), *window)].flatten()

    for pair in pairs.any(0).nonzero().flatten().tolist():
        for group in range(a.groups):
            rows = pairs[group * outs : (group + 1) * outs, pair].nonzero().flatten() + group * outs
            if not len(rows):
                continue
            left, right = inputs(2 * pair, group), inputs(2 * pair + 1, group)
            of_pair = w[rows, 2 * pair : 2 * pair + 2]
            # Most inputs are too small for any of these weights: |a w_a + b w_b| <= (a + b) max |w|.
            large = ((left + right) * of_pair.abs().max() > HIGH).nonzero().flatten()
            exact = torch.stack([left[large], right[large]], 1) @ of_pair.T  # below 2**24: exact in float32
            total[large[:, None], rows] += exact.clamp(LOW, HIGH) - exact
    return total.reshape(len(q), *sizes, -1).movedim(-1, 1)
