"""The exact integer reference: runs a quantized program in the arithmetic of one runtime.

Integers live in float32 tensors. A convolution over them is exact, in whatever order it sums, while every partial
sum stays below 2**24; an op that could exceed that accumulates in float64 instead.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from edgeqat.arguments import check_made
from edgeqat.interpreter.arithmetic import Arithmetic, resolve_arithmetic
from edgeqat.interpreter.arithmetic.base import Saturating
from edgeqat.interpreter.moving import move
from edgeqat.interpreter.pair_table import PairTables
from edgeqat.interpreter.sum_forms import sum_forms
from edgeqat.op_attrs import (
    AveragePoolAttrs,
    ConcatAttrs,
    ConvAttrs,
    ConvTransposeAttrs,
    LinearAttrs,
)
from edgeqat.program import WEIGHTED, Kind, Op, QuantizedProgram
from edgeqat.signature import Batch

__all__ = ["Interpreter", "accumulator_bound", "reference"]

EXACT_FLOAT32 = 2**24
"""Integers up to this are exact in float32."""

CONVOLUTIONS: Mapping[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
"""By the number of spatial dimensions."""

TRANSPOSED: Mapping[int, Callable[..., Tensor]] = {
    1: F.conv_transpose1d,
    2: F.conv_transpose2d,
    3: F.conv_transpose3d,
}
"""By the number of spatial dimensions."""


@overload
def reference(
    program: QuantizedProgram, inputs: Batch, arithmetic: str = ..., taps: Literal[False] = False
) -> Any: ...


@overload
def reference(
    program: QuantizedProgram, inputs: Batch, arithmetic: str = ..., *, taps: Literal[True]
) -> tuple[Any, dict[str, Tensor]]: ...


def reference(
    program: QuantizedProgram, inputs: Batch, arithmetic: str = "onnxruntime/x86", taps: bool = False
) -> Any:
    """Runs `program` in integers.

    Args:
        program: What `convert` returned.
        inputs: A batch of inputs as the model takes them.
        arithmetic: "onnxruntime/x86", "onnxruntime/x86-avx2", "fbgemm" or another of `ARITHMETICS`, or a runtime,
            meaning its arithmetic on this machine.
        taps: Also return every value that has a grid.

    Returns:
        The model's own output structure, dequantized as the artifact does it; with taps, (outputs, {value name:
        int32 tensor}).

    Raises:
        InputError: It is no program, the arithmetic is unknown, or the inputs do not fit the program.
    """
    check_made(program, QuantizedProgram)
    interpreter = Interpreter(program, resolve_arithmetic(arithmetic))
    flat = program.signature.flatten(inputs)
    if not taps:
        return interpreter.run(flat)
    outputs, values = interpreter.run_with_taps(flat)
    return outputs, {name: value.to(torch.int32) for name, value in values.items()}


def accumulator_bound(program: QuantizedProgram, op: Op) -> int:
    """Largest |accumulator| that `op` (conv or linear) can reach: sum |w| * max |q - z| + |bias|, worst channel."""
    assert op.weight is not None
    data = program.consts[op.weight].data
    assert data is not None
    grid = program.grid_of(op.inputs[0])
    _, zero_point = grid.per_tensor()
    reach = max(grid.qmax - zero_point, zero_point - grid.qmin)
    if op.kind is Kind.CONV_TRANSPOSE:
        data = data.transpose(0, 1)
    per_channel = data.double().abs().flatten(1).sum(1) * reach
    if op.bias is not None:
        per_channel = per_channel + op.bias.double().abs()
    return int(per_channel.max())


class Interpreter:
    """A program made ready to run in one arithmetic: weights as float tensors, the last use of each value known."""

    def __init__(self, program: QuantizedProgram, arithmetic: Arithmetic) -> None:
        self.program, self.arithmetic = program, arithmetic
        self._weights = {op.name: self._weight(op) for op in program.ops if op.kind in WEIGHTED}
        self._pairs = PairTables()
        self._sums = sum_forms(program) if arithmetic.fuses_sums else {}
        self._summed = {form.conv: form for form in self._sums.values() if form.conv is not None}
        self._tapped = frozenset(program.tapped()) - self._summed.keys()
        self._reads = Counter(name for op in program.ops for name in op.inputs)
        self._reads.update(program.outputs)

    def run(self, inputs: list[Tensor]) -> Any:
        """The model's outputs for its flat input tensors."""
        return self._run(inputs, None)

    def run_with_taps(self, inputs: list[Tensor]) -> tuple[Any, dict[str, Tensor]]:
        """The outputs, and every value that has a grid, as integers in float32."""
        taps: dict[str, Tensor] = {}
        return self._run(inputs, taps), taps

    def run_op(self, op: Op, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        """What one op of the program makes of its inputs: integers in float32 where a value has a grid, else float."""
        with torch.no_grad():
            return self._step(op, inputs)

    def _run(self, inputs: list[Tensor], taps: dict[str, Tensor] | None) -> Any:
        env = dict(zip(self.program.inputs, inputs, strict=True))
        env |= {n: x.to(torch.float32) for n, x in env.items() if self.program.values[n].grid is not None}
        left = Counter(self._reads)
        with torch.no_grad():
            for op in self.program.ops:
                results = self._step(op, [env[name] for name in op.inputs])
                for name, result in zip(op.outputs, results, strict=True):
                    env[name] = result
                    if taps is not None and name in self._tapped:
                        taps[name] = result
                for name in op.inputs:  # free what nobody reads any more
                    left[name] -= 1
                    if not left[name]:
                        env.pop(name, None)
        return self.program.signature.unflatten([env[name] for name in self.program.outputs])

    def _weight(self, op: Op) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Weight and integer bias as float tensors, float64 where float32 could round an accumulator; float bias."""
        assert op.weight is not None
        const = self.program.consts[op.weight]
        assert const.data is not None
        exact = accumulator_bound(self.program, op) < EXACT_FLOAT32
        dtype = torch.float32 if exact else torch.float64
        if op.bias is None:
            return const.data.to(dtype), None, None
        input_scale, _ = self.program.grid_of(op.inputs[0]).filled()
        inside, outside = self.arithmetic.split_bias(op.bias, input_scale, const.grid.filled()[0])
        return const.data.to(dtype), None if inside is None else inside.to(dtype), outside

    def _step(self, op: Op, args: list[Tensor]) -> tuple[Tensor, ...]:
        program, a = self.program, self.arithmetic
        if op.kind is Kind.FLOAT:
            assert op.body is not None
            results: tuple[Tensor, ...] = op.body(*args)
            return results
        if op.kind is Kind.QUANTIZE:
            return (a.quantize(args[0], program.grid_of(op.name)),)
        if op.kind is Kind.DEQUANTIZE:
            return (a.dequantize(args[0], program.grid_of(op.inputs[0])),)
        if op.kind in WEIGHTED:
            return (self._accumulate(op, args[0]),)
        if op.kind in (Kind.CONSTANT, Kind.LOOKUP):
            data = program.consts[op.name].data
            assert data is not None
            table = data.to(torch.float32)
            return (table[args[0].long()] if args else table,)
        if op.kind in (Kind.ADD, Kind.MUL, Kind.MATMUL, Kind.CONCAT):
            return (self._combine(op, args),)
        if op.kind is Kind.AVERAGE_POOL:
            return (self._average_pool(op, args[0]),)
        return (move(op, args[0], program.grid_of(op.inputs[0]).per_tensor()[1]),)

    def _combine(self, op: Op, args: list[Tensor]) -> Tensor:
        """Ops over several values, each on its own grid."""
        a, grids, grid = self.arithmetic, [self.program.grid_of(n) for n in op.inputs], self.program.grid_of(op.name)
        if op.kind is Kind.ADD:
            if op.name in self._sums:
                return a.add(args[0], grids[0], args[1], grids[1], grid, self._sums[op.name])
            return self._pairs.combine(op.name, a.add, a.add_block, args[0], grids[0], args[1], grids[1], grid)
        if op.kind is Kind.MUL:
            return self._pairs.combine(op.name, a.mul, 1, args[0], grids[0], args[1], grids[1], grid)
        if isinstance(op.attrs, ConcatAttrs):
            dim = op.attrs.dim
            parts = [q if g is grid else a.change_grid(q, g, grid, dim) for q, g in zip(args, grids, strict=True)]
            return torch.cat(parts, dim)
        (s_a, z_a), (s_b, z_b) = (g.filled() for g in grids)
        # float64 holds every sum of products of integers exactly.
        acc = (args[0].double() - z_a) @ (args[1].double() - z_b)
        return a.requantize(acc, None, s_a, s_b, grid, op.attrs)

    def _accumulate(self, op: Op, x: Tensor) -> Tensor:
        assert op.weight is not None
        x_grid, w_grid = self.program.grid_of(op.inputs[0]), self.program.consts[op.weight].grid
        (s_x, z_x), (s_w, _) = x_grid.filled(), w_grid.filled()
        weight, bias, float_bias = self._weights[op.name]
        # Subtracting the zero point first makes zero padding pad with real zeros; what is rectified has none.
        shifted = (x - z_x if int(z_x) else x).to(weight.dtype)
        if isinstance(op.attrs, ConvAttrs):
            acc = _convolve(shifted, weight, bias, op.attrs)
        elif isinstance(op.attrs, ConvTransposeAttrs):
            acc = _convolve_transposed(shifted, weight, bias, op.attrs)
        else:
            acc = F.linear(shifted.flatten(0, -2), weight, bias)  # [N, C]: the channels second, as in a conv
        if isinstance(self.arithmetic, Saturating):
            lost = self.arithmetic.saturation(x, x_grid, weight, op.attrs)
            acc = acc if lost is None else acc + lost
        grid = self.program.values[op.name].grid
        if op.name in self._summed and self._summed[op.name].unit is not None:
            result = acc.to(torch.float32)
        elif grid is None or op.name in self._summed:
            result = self.arithmetic.float_linear(acc, float_bias, s_x, s_w)
        else:
            result = self.arithmetic.requantize(acc, float_bias, s_x, s_w, grid, op.attrs)
        return result.reshape(*x.shape[:-1], -1) if isinstance(op.attrs, LinearAttrs) and x.dim() != 2 else result

    def _average_pool(self, op: Op, x: Tensor) -> Tensor:
        attrs, x_grid, grid = op.attrs, self.program.grid_of(op.inputs[0]), self.program.grid_of(op.name)
        assert isinstance(attrs, AveragePoolAttrs)
        if attrs.kernel is None:
            return self.arithmetic.global_average_pool(x, x_grid, grid)
        return self.arithmetic.average_pool(x, x_grid, grid, attrs)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, attrs: ConvAttrs) -> Tensor:
    padding = tuple(before for before, _ in attrs.padding)
    if any(before != after for before, after in attrs.padding):
        x = F.pad(x, [side for pair in reversed(attrs.padding) for side in pair])
        padding = (0,) * len(padding)
    convolve = CONVOLUTIONS[len(attrs.stride)]
    result: Tensor = convolve(x, weight, bias, attrs.stride, padding, attrs.dilation, attrs.groups)
    return result


def _convolve_transposed(x: Tensor, weight: Tensor, bias: Tensor | None, attrs: ConvTransposeAttrs) -> Tensor:
    convolve = TRANSPOSED[len(attrs.stride)]
    result: Tensor = convolve(
        x, weight, bias, attrs.stride, attrs.padding, attrs.output_padding, dilation=attrs.dilation
    )
    return result
