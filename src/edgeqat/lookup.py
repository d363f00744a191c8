"""Functions of one element, and their integer tables.

A table has an entry for every integer q of the input's grid: the integer of f(scale * (q - zero_point)) on the
output's grid, computed in float64 and rounded half to even. It is made once, when a simulation is frozen, and is what
the reference and every runtime use.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from edgeqat.op_attrs import LookupAttrs
from edgeqat.program import Grid

__all__ = ["FUNCTIONS", "Function", "fixed_grid", "table_of"]


@dataclass(frozen=True)
class Function:
    """One function of an element.

    Attributes:
        compute: float64 and the arguments to float64.
        range: (low, high) of every result, where the output's grid is fixed by it; `high` itself is not reached.
    """

    compute: Callable[..., Tensor]
    range: tuple[float, float] | None = None


FUNCTIONS: Mapping[str, Function] = {
    "sigmoid": Function(torch.sigmoid, (0.0, 1.0)),
    "hardsigmoid": Function(F.hardsigmoid, (0.0, 1.0)),
    "tanh": Function(torch.tanh, (-1.0, 1.0)),
    "leaky_relu": Function(F.leaky_relu),
    "elu": Function(lambda x, alpha, scale, gain: scale * torch.where(x > 0, x, alpha * torch.expm1(x * gain))),
    "gelu": Function(F.gelu),
    "gelu_tanh": Function(lambda x: F.gelu(x, approximate="tanh")),
    "mish": Function(F.mish),
    "softplus": Function(F.softplus),
    "clamp": Function(lambda x, low, high: x.clamp(low, high)),
    "neg": Function(torch.neg),
    "abs": Function(torch.abs),
    "exp": Function(torch.exp),
    "square": Function(torch.square),
    "scale": Function(lambda x, factor: x * factor),
    "shift": Function(lambda x, addend: x + addend),
    "divide": Function(lambda x, divisor: x / divisor),
    "subtract_from": Function(lambda x, minuend: minuend - x),
}
"""By name. sigmoid, hardsigmoid and tanh have grids that nothing needs to be observed for."""


def fixed_grid(function: str, bits: int, symmetric: bool = False) -> tuple[Tensor, Tensor] | None:
    """The scale (float32, 0-d) and zero_point (int32, 0-d) of a function's result, where its range fixes them.

    `symmetric` puts the zero point in the middle, whatever the range.

    >>> fixed_grid("tanh", 8)
    (tensor(0.0078), tensor(128, dtype=torch.int32))
    """
    found = FUNCTIONS[function].range
    if found is None:
        return None
    low, high = found
    if symmetric:
        low, high = -max(-low, high), max(-low, high)
    scale = (high - low) / 2**bits
    return torch.tensor(scale), torch.tensor(round(-low / scale), dtype=torch.int32)


def table_of(attrs: LookupAttrs, source: Grid, result: Grid) -> Tensor:
    """The table of a function between two grids: uint8, an entry for every integer of `source`, in order.

    Args:
        attrs: Which function.
        source: The input's grid, filled in.
        result: The output's, filled in.
    """
    (s_x, z_x), (s_y, z_y) = source.filled(), result.filled()
    q = torch.arange(source.qmin, source.qmax + 1, dtype=torch.float64)
    y = FUNCTIONS[attrs.function].compute((q - z_x.double()) * s_x.double(), *attrs.arguments)
    return (torch.round(y / s_y.double()) + z_y).clamp(result.qmin, result.qmax).to(torch.uint8)
