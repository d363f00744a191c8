"""Functions of one element, and their integer tables.

A table has an entry for every integer q of the input's grid: the integer of f(scale * (q - zero_point)) on the
output's grid, computed in float64 and rounded half to even. It is made once, when a simulation is frozen, and is what
the reference and every runtime use.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from edgeqat.op_attrs import LookupAttrs
from edgeqat.program import Grid, Op, QuantizedProgram

__all__ = [
    "FUNCTIONS",
    "NEAR_TIE",
    "Function",
    "away_from_ties",
    "distance_to_tie",
    "fixed_grid",
    "stored_table",
    "table_of",
]

NEAR_TIE = 2.0**-13
"""Steps: float kernels of two machines differ by less, some units in the last place of 256 steps. GELU of
inputs far below zero alone, a difference of close numbers, may differ by more."""

NUDGES = [0.0] + [sign * k * 2.0**-17 for k in range(1, 65) for sign in (1, -1)]
"""Parts of itself that a scale may be moved by; the entries of a sigmoid's table move by up to 57 times that."""


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
    _, z_y = result.filled()
    return (torch.round(_in_steps(attrs, source, result)) + z_y).clamp(result.qmin, result.qmax).to(torch.uint8)


def stored_table(program: QuantizedProgram, op: Op) -> Tensor:
    """The table of a lookup, as a converted program holds it: uint8."""
    data = program.consts[op.name].data
    assert data is not None
    return data


def distance_to_tie(attrs: LookupAttrs, source: Grid, result: Grid) -> float:
    """How far the entry of a table that is nearest to halfway between two integers is from there, in steps."""
    _, z_y = result.filled()
    y = _in_steps(attrs, source, result) + z_y
    inside = y[(y > result.qmin) & (y < result.qmax)]
    return float((inside - inside.floor() - 0.5).abs().amin()) if len(inside) else 0.5


def away_from_ties(attrs: LookupAttrs, source: Grid, result: Grid) -> Grid | None:
    """`source`, or a grid that gives the same table, with no entry near a tie; None if there is none.

    A float kernel that fills a table may differ in its last bits from one machine to another. Given the scale of this
    grid in place of the input's own, it makes the very table on all of them.
    """
    scale, _ = source.filled()
    table = table_of(attrs, source, result)
    for nudge in NUDGES:
        moved = source if nudge == 0 else replace(source, scale=(scale.double() * (1 + nudge)).float())
        if torch.equal(table_of(attrs, moved, result), table) and distance_to_tie(attrs, moved, result) > NEAR_TIE:
            return moved
    return None


def _in_steps(attrs: LookupAttrs, source: Grid, result: Grid) -> Tensor:
    """The function of every integer of `source`, float64, in steps of `result` from its zero."""
    (s_x, z_x), (s_y, _) = source.filled(), result.filled()
    q = torch.arange(source.qmin, source.qmax + 1, dtype=torch.float64)
    return FUNCTIONS[attrs.function].compute((q - z_x.double()) * s_x.double(), *attrs.arguments) / s_y.double()
