"""Tables that lie on a line, as the depthwise convolution of one tap whose kernel gives all of their integers.

A hard sigmoid is a line that saturates where its grid ends, and so is every sum and product with a number. XNNPACK and
LiteRT have no kernel for those functions, but one for round((w * (q - z_x) + b) * s) + z_y. A weight of 8 bits and a
bias in its steps do not meet a line exactly; of 127 weights, the one is taken whose result has the table's integers,
all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter

import numpy as np
import torch

from edgeqat.interpreter.arithmetic import ARITHMETICS
from edgeqat.lookup import stored_table
from edgeqat.op_attrs import ConvAttrs, LookupAttrs
from edgeqat.program import Op, QuantizedProgram

__all__ = ["Line", "as_image", "line_of"]

WEIGHT_MAX = 127

BIAS_MAX = 2**23
"""With a product of two integers, it is still a number that float32 holds exactly."""

CHANNELS_MAX = 256
"""Of an image that a line runs over: a weight, a bias and their scales are stored for each."""

FACTOR_MIN, FACTOR_MAX = 2.0**-31, 2.0**8
"""What XNNPACK takes of a convolution's s_x * s_w / s_y; it refuses others when a file is loaded."""

CHANNELS = 9
"""Copies of a table that an arithmetic is asked for: a block of channels, and one left over."""

TAP = ConvAttrs((1, 1), ((0, 0), (0, 0)), (1, 1), CHANNELS)

LINES: Mapping[str, Callable[[Sequence[float]], tuple[float, float]]] = {
    "hardsigmoid": lambda arguments: (1 / 6, 1 / 2),
    "shift": lambda arguments: (1.0, arguments[0]),
    "subtract_from": lambda arguments: (-1.0, arguments[0]),
    "scale": lambda arguments: (arguments[0], 0.0),
    "divide": lambda arguments: (1 / arguments[0] if arguments[0] else 0.0, 0.0),
    "neg": lambda arguments: (-1.0, 0.0),
    "clamp": lambda arguments: (1.0, 0.0),
}
"""Slope and value at zero of functions that are lines, between bounds."""


@dataclass(frozen=True)
class Line:
    """A depthwise convolution of one tap.

    Attributes:
        weight: Of every channel, an int8.
        scale: Of the weight, a float32.
        bias: Of every channel, in steps of the input's scale by the weight's.
    """

    weight: int
    scale: float
    bias: int


def as_image(shape: Sequence[int | str]) -> tuple[int, int, int] | None:
    """How a value that lies in memory with this shape is taken as an image: height, width, channels.

    The same elements in the same sequence, for each sample. None where the batch is not the first dimension, or
    another size is open.
    """
    sizes = [size for size in shape[1:] if isinstance(size, int)]
    if not isinstance(shape[0], str) or len(sizes) != len(shape) - 1:
        return None
    if len(sizes) == 3 and sizes[2] <= CHANNELS_MAX:
        return sizes[0], sizes[1], sizes[2]
    n = math.prod(sizes)
    channels = max(c for c in range(1, CHANNELS_MAX + 1) if n % c == 0)
    return 1, n // channels, channels


def line_of(program: QuantizedProgram, op: Op, arithmetics: Sequence[str]) -> Line | None:
    """The line that gives a lookup's whole table in each of some arithmetics; None if there is none."""
    assert isinstance(op.attrs, LookupAttrs)
    if op.attrs.function not in LINES:
        return None
    x_grid, grid = program.grid_of(op.inputs[0]), program.grid_of(op.name)
    s_x, z_x = x_grid.filled()
    q = torch.arange(x_grid.qmin, x_grid.qmax + 1).double() - z_x
    wanted = stored_table(program, op).float().expand(1, CHANNELS, 1, len(q))
    for line in _near(*LINES[op.attrs.function](op.attrs.arguments), float(s_x), grid.per_tensor()[0]):
        acc = (q * line.weight + line.bias).expand_as(wanted)
        scale = torch.tensor(line.scale).expand(CHANNELS)
        found = (ARITHMETICS[name].requantize(acc, None, s_x, scale, grid, TAP) for name in arithmetics)
        if all(torch.equal(y, wanted) for y in found):
            return line
    return None


def _near(slope: float, at_zero: float, s_x: float, s_y: float) -> list[Line]:
    """Lines for every weight, the nearest to the wanted one first; the larger weight of two that are as near."""
    found: list[tuple[float, Line]] = []
    for size in range(WEIGHT_MAX, 0, -1):
        if not FACTOR_MIN < s_x * abs(slope) / size / s_y < FACTOR_MAX:
            continue
        scale = float(np.float32(abs(slope) / size))
        if scale == 0:
            continue
        bias = at_zero / (s_x * scale)
        if abs(bias) < BIAS_MAX:
            line = Line(size if slope > 0 else -size, scale, round(bias))
            found.append((abs(line.bias - bias) * s_x * scale / s_y, line))
    return [line for _, line in sorted(found, key=itemgetter(0))]
