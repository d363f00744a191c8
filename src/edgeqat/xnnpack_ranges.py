"""The ratios of scales that XNNPACK's kernels are made for, in one place for who warns and who refuses.

It refuses a conv's beyond them when a model is loaded. An addition's it does not check: below 2**-11 and at 2**21
the sums were found wrong.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from edgeqat.program import WEIGHTED, Kind, Op, QuantizedProgram

__all__ = ["RANGES", "RATIOS", "scale_ratios"]

LARGEST = 2.0**8

RANGES: Mapping[Kind, tuple[float, float]] = {
    **dict.fromkeys(WEIGHTED, (2.0**-32, LARGEST)),
    Kind.ADD: (2.0**-10, LARGEST),
    Kind.MUL: (2.0**-16, LARGEST),
    Kind.CONCAT: (2.0**-16, LARGEST),  # what is concatenated is multiplied by one
}
"""Ratios that it takes: at least the first, below the second."""

RATIOS: Mapping[Kind, str] = {
    **dict.fromkeys(WEIGHTED, "input scale times weight scale over the output's"),
    Kind.ADD: "the larger of the inputs' scales over the output's",
    Kind.MUL: "the product of the inputs' scales over the output's",
    Kind.CONCAT: "an input's scale over the output's",
}
"""What the ratios are."""


def scale_ratios(program: QuantizedProgram, op: Op) -> Tensor:
    """The ratios that an op's kernel multiplies with: float32 [any], none where it multiplies with none."""
    grid = program.values[op.name].grid
    if grid is None or op.kind not in RANGES:
        return torch.empty(0)
    scale, _ = grid.filled()
    grids = [program.grid_of(name) for name in op.inputs]
    scales = [found.filled()[0] for found in grids]
    if op.weight is not None:
        return ((scales[0] * program.consts[op.weight].grid.filled()[0]) / scale).reshape(-1)
    if op.kind is Kind.MUL:
        return ((scales[0] * scales[1]) / scale).reshape(1)
    if op.kind is Kind.ADD:
        return (torch.maximum(scales[0], scales[1]) / scale).reshape(1)
    moved = [own / scale for own, found in zip(scales, grids, strict=True) if found is not grid]
    return torch.stack(moved) if moved else torch.empty(0)
