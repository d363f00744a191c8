"""TorchScript spelling of tables: torch's own INT8 kernel where it gives the table's integers, else the table itself.

A kernel counts only if it does so on every engine that the file is for, at every position in a tensor.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from edgeqat.op_attrs import LookupAttrs
from edgeqat.program import Op, QuantizedProgram
from edgeqat.replay.run_torchscript import on_engine

__all__ = ["Kernel", "kernels_of", "look_up"]

Kernel = Callable[[Tensor], Tensor]

SHIFTED = 37
"""The integers are tried three times over and with so many more, at each position that vector kernels have."""


def look_up(table: Tensor, x: Tensor, scale: float, zero_point: int) -> Tensor:
    """The entries of a table for the integers of x, in x's order of memory.

    Args:
        table: uint8, [256].
        x: quint8, any shape.
        scale: Of the result.
        zero_point: Of the result.
    """
    integers = x.int_repr()
    last = integers.permute(0, 2, 3, 1) if x.dim() == 4 else integers  # 4-d values have their channels last in memory
    found = torch.index_select(table, 0, last.reshape(-1).to(torch.int32)).view_as(last)
    found = found.permute(0, 3, 1, 2) if x.dim() == 4 else found
    return torch._make_per_tensor_quantized_tensor(found, scale, zero_point)


def kernels_of(program: QuantizedProgram, engines: Sequence[str]) -> dict[str, Kernel]:
    """By the name of a lookup: the kernel that computes its table, where one does on all these engines."""
    found: dict[str, Kernel] = {}
    for op in program.ops:
        kernel = _kernel(program, op)
        if kernel is not None and all(_is_exact(program, op, kernel, engine) for engine in engines):
            found[op.name] = kernel
    return found


def _kernel(program: QuantizedProgram, op: Op) -> Kernel | None:
    if not isinstance(op.attrs, LookupAttrs):
        return None
    if op.attrs.function in OWN_GRID:
        return OWN_GRID[op.attrs.function]
    scale, zero_point = program.grid_of(op.name).per_tensor()
    if op.attrs.function == "leaky_relu":
        return partial(_leaky_relu, op.attrs.arguments[0], scale, zero_point)
    return None


def _leaky_relu(slope: float, scale: float, zero_point: int, x: Tensor) -> Tensor:
    result: Tensor = torch.ops.quantized.leaky_relu(x, slope, False, scale, zero_point)
    return result


OWN_GRID: Mapping[str, Kernel] = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "hardsigmoid": torch.nn.functional.hardsigmoid,
}
"""Kernels whose result is on the function's fixed grid."""


def _is_exact(program: QuantizedProgram, op: Op, kernel: Kernel, engine: str) -> bool:
    source, result = program.grid_of(op.inputs[0]), program.grid_of(op.name)
    table = program.consts[op.name].data
    assert table is not None
    q = torch.arange(3 * len(table) + SHIFTED) % len(table)
    with on_engine(engine), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces that its quantized tensor types will go
        y = kernel(torch._make_per_tensor_quantized_tensor(q.to(torch.uint8), *source.per_tensor()))
    on_grid = (y.q_scale(), y.q_zero_point()) == result.per_tensor()
    return on_grid and torch.equal(y.int_repr(), table[q])
