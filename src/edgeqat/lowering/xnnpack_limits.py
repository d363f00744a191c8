"""The ratios of scales that XNNPACK's kernels are made for.

It refuses a conv's beyond them when a model is loaded. An addition's it does not check: below 2**-11 and at 2**21
the sums were found wrong.
"""

from __future__ import annotations

from collections.abc import Iterator

from edgeqat.errors import EdgeqatError
from edgeqat.program import Kind, Op, QuantizedProgram

__all__ = ["check_scales"]

LARGEST = 2.0**8
WEIGHTED, ADDEND, FACTOR = 2.0**-32, 2.0**-10, 2.0**-16
"""The smallest ratios of weighted ops, additions and products."""


def check_scales(program: QuantizedProgram) -> None:
    """Raises EdgeqatError for the first op with a ratio of scales that XNNPACK refuses."""
    for op in program.ops:
        for what, ratio, smallest in _ratios(program, op):
            if not smallest <= ratio < LARGEST:
                raise EdgeqatError(
                    f"{op.name}: found {what} of {ratio:.3g}, wanted one from {smallest:.3g} to {LARGEST:.0f}, which "
                    "is what XNNPACK takes; calibrate on data of its real range, or leave the op in float"
                )


def _ratios(program: QuantizedProgram, op: Op) -> Iterator[tuple[str, float, float]]:
    """(what it is, a ratio, the smallest that is taken)."""
    if op.kind not in (Kind.ADD, Kind.MUL, Kind.CONCAT) and op.weight is None:
        return
    grid, grids = program.grid_of(op.name), [program.grid_of(name) for name in op.inputs]
    scale, scales = grid.filled()[0], [found.filled()[0] for found in grids]
    if op.kind is Kind.MUL:
        yield "the product of the inputs' scales over the output's", float(scales[0] * scales[1] / scale), FACTOR
    elif op.weight is not None:
        weights, _ = program.consts[op.weight].grid.filled()
        for weight in (weights.min(), weights.max()):
            yield "input scale times weight scale over the output's", float(scales[0] * weight / scale), WEIGHTED
    elif op.kind is Kind.ADD:
        yield "the larger of the inputs' scales over the output's", float(max(scales) / scale), ADDEND
    else:  # what is concatenated is multiplied by one
        for found, other in zip(grids, scales, strict=True):
            if found is not grid:
                yield "an input's scale over the output's", float(other / scale), FACTOR
