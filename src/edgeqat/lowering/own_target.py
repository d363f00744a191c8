"""Whether a program keeps to what a target takes: it may have been planned for another."""

from __future__ import annotations

import torch
from torch import Tensor

from edgeqat import affine
from edgeqat.errors import PlanError
from edgeqat.program import Grid, Kind, QuantizedProgram
from edgeqat.target_table import Target

__all__ = ["check_clamps", "check_follows"]

STORED_MAX = 255


def check_clamps(program: QuantizedProgram, target: Target) -> None:
    """Checks that a runtime clamps every activation where its grid ends.

    Raises:
        PlanError: It does not.
    """
    for value in program.values.values():
        if value.grid is not None and value.grid.qmax != STORED_MAX and not target.clamps_anywhere:
            raise _other(target, f"{value.name} has the integers {value.grid.qmin}..{value.grid.qmax}")


def check_follows(program: QuantizedProgram, target: Target) -> None:
    """Checks every op and grid of a converted program.

    Raises:
        PlanError: One is not what the target takes.
    """
    for op in program.ops:
        if op.kind is not Kind.FLOAT and op.kind not in target.kinds:
            raise _other(target, f"{op.name} is an integer {op.kind.value}")
        if op.weight is not None:
            problem = _weight_problem(program.consts[op.weight].grid, target)
            if problem:
                raise _other(target, f"the weight of {op.name} {problem}")
    for value in program.values.values():
        problem = "" if value.grid is None else _activation_problem(value.grid, target)
        if problem:
            raise _other(target, f"{value.name} {problem}")


def _activation_problem(grid: Grid, target: Target) -> str:
    scale, zero_point = grid.filled()
    middles = {(2**bits) // 2 for bits in target.activation_bits}
    allowed = middles if target.centred else {0, *middles}
    if target.symmetric_activations and int(zero_point) not in allowed:
        return f"has the zero point {int(zero_point)}, not one of {', '.join(map(str, sorted(allowed)))}"
    if grid.qmax > 2 ** max(target.activation_bits) - 1:
        return f"has the integers {grid.qmin}..{grid.qmax}"
    if target.power_of_two_activations and not _are_powers_of_two(scale):
        return f"has the scale {float(scale):.4g}, no power of two"
    return ""


def _weight_problem(grid: Grid, target: Target) -> str:
    scale, _ = grid.filled()
    if grid.axis is not None and not target.per_channel_weights:
        return "has a scale for each channel"
    if grid.qmax > 2 ** (max(target.weight_bits) - 1) - 1:
        return f"has the integers {grid.qmin}..{grid.qmax}"
    if target.power_of_two_weights and not _are_powers_of_two(scale):
        return "has scales that are no powers of two"
    return ""


def _are_powers_of_two(scale: Tensor) -> bool:
    return torch.equal(affine.power_of_two_above(scale), scale)


def _other(target: Target, found: str) -> PlanError:
    return PlanError(f"{found}, which {target.name} does not take; plan the model for {target.spelled}")
