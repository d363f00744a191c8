"""Refuses programs whose scales XNNPACK's kernels are not made for, before it computes them wrongly."""

from __future__ import annotations

from edgeqat.errors import EdgeqatError
from edgeqat.program import QuantizedProgram
from edgeqat.xnnpack_ranges import RANGES, RATIOS, scale_ratios

__all__ = ["check_scales"]


def check_scales(program: QuantizedProgram) -> None:
    """Raises EdgeqatError for the first op with a ratio of scales that XNNPACK refuses."""
    for op in program.ops:
        ratios = scale_ratios(program, op)
        if not len(ratios):
            continue
        low, high = RANGES[op.kind]
        for ratio in (float(ratios.min()), float(ratios.max())):
            if not low <= ratio < high:
                raise EdgeqatError(
                    f"{op.name}: found {RATIOS[op.kind]} of {ratio:.3g}, wanted one from {low:.3g} to {high:.0f}, "
                    "which is what XNNPACK takes; calibrate on data of its real range, or leave the op in float"
                )
