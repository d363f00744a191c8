"""A quantized program as a module that torch.export captures and inductor compiles to integer kernels.

Convolutions and linear layers call oneDNN's INT8 kernels by name, instead of being found in a QDQ graph by inductor's
pattern matcher: what runs does not depend on what a matcher recognises, and every integer is rounded where the program
says so. All else is written out op by op as `interpreter/arithmetic/aoti.py` computes it; inductor's compiled loops
keep the order of float operations and fuse no product with a sum.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgeqat import affine
from edgeqat.interpreter.moving import move
from edgeqat.interpreter.run import EXACT_FLOAT32, TRANSPOSED, accumulator_bound
from edgeqat.lowering.padding import padding_index
from edgeqat.op_attrs import (
    AveragePoolAttrs,
    ConcatAttrs,
    ConvAttrs,
    ConvTransposeAttrs,
    MaxPoolAttrs,
    PadAttrs,
    ResizeAttrs,
)
from edgeqat.program import BATCH_DIM, Grid, Kind, Op, QuantizedProgram

__all__ = ["Network"]

PLAIN: tuple[Any, ...] = ("none", [], "")
"""No op fused behind a kernel: its name, its numbers, its algorithm."""

LARGEST_PRODUCT = 255 * 255


class Network(nn.Module):
    """Runs the program op by op over uint8 tensors; takes its inputs, gives a tuple of its outputs."""

    def __init__(self, program: QuantizedProgram) -> None:
        super().__init__()
        self.program = program
        for index, op in enumerate(program.ops):
            if op.weight is not None:
                self._hold_weight(index, op)
            elif op.body is not None:
                self.add_module(f"island{index}", op.body)
            elif op.kind in (Kind.LOOKUP, Kind.CONSTANT):
                self.register_buffer(f"table{index}", program.consts[op.name].data)
            elif isinstance(op.attrs, AveragePoolAttrs) and op.attrs.kernel is not None:
                scale, _ = program.grid_of(op.inputs[0]).filled()
                self.register_buffer(f"share{index}", scale / _counts(op.attrs, program.values[op.inputs[0]].shape))

    def examples(self) -> tuple[Tensor, ...]:
        """Inputs of a batch of 2, which torch.export does not take for a constant."""
        values = [self.program.values[name] for name in self.program.inputs]
        sizes = [[2 if size == BATCH_DIM else int(size) for size in value.shape] for value in values]
        return tuple(torch.zeros(size, dtype=value.dtype) for size, value in zip(sizes, values, strict=True))

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        env = dict(zip(self.program.inputs, inputs, strict=True))
        for index, op in enumerate(self.program.ops):
            results = self._step(index, op, [env[name] for name in op.inputs])
            env.update(zip(op.outputs, results, strict=True))
        return tuple(env[name] for name in self.program.outputs)

    def _hold_weight(self, index: int, op: Op) -> None:
        assert op.weight is not None
        const = self.program.consts[op.weight]
        assert const.data is not None
        scale, _ = const.grid.filled()
        input_scale, _ = self.program.grid_of(op.inputs[0]).filled()
        data = const.data
        if op.kind is Kind.CONV and self.program.values[op.inputs[0]].shape[1] == 1:
            data = F.pad(data, [0, 0] * (data.dim() - 2) + [0, 1])
        elif op.kind is Kind.CONV_TRANSPOSE:
            exact = accumulator_bound(self.program, op) < EXACT_FLOAT32
            data = data.to(torch.float32 if exact else torch.float64)
        self.register_buffer(f"weight{index}", data)
        self.register_buffer(f"scale{index}", scale.reshape(-1))
        self.register_buffer(f"zero{index}", torch.zeros(scale.numel(), dtype=torch.int64))
        bias = None if op.bias is None else affine.float_bias(op.bias, input_scale, scale)
        self.register_buffer(f"bias{index}", bias)

    def _step(self, index: int, op: Op, args: list[Tensor]) -> tuple[Tensor, ...]:
        if op.kind is Kind.FLOAT:
            results: tuple[Tensor, ...] = self.get_submodule(f"island{index}")(*args)
            return results
        if op.kind is Kind.DEQUANTIZE:
            return (_dequantize(args[0], self.program.grid_of(op.inputs[0])),)
        if op.kind in (Kind.CONV, Kind.LINEAR):
            return (self._weighted(index, op, args[0]),)
        if op.kind is Kind.CONSTANT:
            return (self.get_buffer(f"table{index}"),)
        if op.kind is Kind.LOOKUP:
            return (self.get_buffer(f"table{index}")[args[0].to(torch.int64)],)
        grid = self.program.grid_of(op.name)
        if op.kind is Kind.QUANTIZE:
            return (_quantize(args[0], grid),)
        if isinstance(op.attrs, ConvTransposeAttrs):
            return (self._transposed(index, op.attrs, args[0], self.program.grid_of(op.inputs[0]), grid),)
        if op.kind in (Kind.ADD, Kind.MUL, Kind.MATMUL, Kind.CONCAT):
            return (_combine(op, args, [self.program.grid_of(name) for name in op.inputs], grid),)
        if isinstance(op.attrs, AveragePoolAttrs):
            share = None if op.attrs.kernel is None else self.get_buffer(f"share{index}")
            return (_average(op.attrs, args[0], share, self.program.grid_of(op.inputs[0]), grid),)
        return (_move(op, args[0], self.program.grid_of(op.inputs[0]).per_tensor()[1]),)

    def _weighted(self, index: int, op: Op, x: Tensor) -> Tensor:
        """oneDNN's kernels, to uint8 where the result has a grid, else to float32.

        inductor takes the result for contiguous, which it is not, where the input is so in channels-last order too:
        with one channel, which gets a second one that counts for nothing, or one pixel, which is padded before.
        """
        grid = self.program.values[op.name].grid
        to = (1.0, 0, torch.float32) if grid is None else (*grid.per_tensor(), torch.uint8)
        source = self.program.grid_of(op.inputs[0]).per_tensor()
        weight, scale, zero, bias = (self._buffers[f"{part}{index}"] for part in ("weight", "scale", "zero", "bias"))
        result: Tensor
        if not isinstance(op.attrs, ConvAttrs):
            packed = torch.ops.onednn.qlinear_prepack(weight, None)
            rows = x.reshape(-1, x.shape[-1])
            result = torch.ops.onednn.qlinear_pointwise(rows, *source, packed, scale, zero, bias, *to, *PLAIN)
            return result.reshape(*x.shape[:-1], -1)
        a = op.attrs
        padding = [before for before, _ in a.padding]
        if any(before != after for before, after in a.padding) or math.prod(x.shape[2:]) == 1:
            x = F.pad(x, [side for pair in reversed(a.padding) for side in pair], value=source[1])
            padding = [0] * len(padding)
        if x.shape[1] == 1:
            x = F.pad(x, [0, 0] * len(padding) + [0, 1], value=source[1])
        geometry: tuple[Any, ...] = (list(a.stride), padding, list(a.dilation), a.groups)
        packed = torch.ops.onednn.qconv_prepack(weight, scale, *source, *geometry, None)
        result = torch.ops.onednn.qconv_pointwise(x, *source, packed, scale, zero, bias, *geometry, *to, *PLAIN)
        return result

    def _transposed(self, index: int, a: ConvTransposeAttrs, x: Tensor, x_grid: Grid, grid: Grid) -> Tensor:
        """Over integers in floats, since oneDNN's kernel for them is not to be had."""
        s_x, z_x = x_grid.per_tensor()
        weight, scale, bias = (self._buffers[f"{part}{index}"] for part in ("weight", "scale", "bias"))
        assert weight is not None and scale is not None
        acc = TRANSPOSED[len(a.stride)](
            x.to(weight.dtype) - z_x, weight, None, a.stride, a.padding, a.output_padding, dilation=a.dilation
        )
        return _requantize(acc, s_x, scale, bias, grid)


@functools.cache
def register_shapes() -> None:
    """Tells torch.export what packing a weight gives, which torch does not; inductor packs when it folds constants."""
    torch.library.register_fake("onednn::qconv_prepack", lambda weight, *others: torch.empty_like(weight))
    torch.library.register_fake("onednn::qlinear_prepack", lambda weight, shape: weight.new_empty(weight.shape).t())


def _quantize(x: Tensor, grid: Grid) -> Tensor:
    scale, zero_point = grid.per_tensor()
    steps = torch.clamp(x / scale, grid.qmin - zero_point, grid.qmax - zero_point)
    return (torch.round(steps) + zero_point).to(torch.uint8)


def _dequantize(q: Tensor, grid: Grid) -> Tensor:
    scale, zero_point = grid.per_tensor()
    return (q.to(torch.float32) - zero_point) * scale


def _requantize(acc: Tensor, input_scale: float, weight_scale: Tensor, bias: Tensor | None, grid: Grid) -> Tensor:
    """As oneDNN's kernels do it, step by step; channels are dimension 1."""
    scale, zero_point = grid.per_tensor()
    real = acc.to(torch.float32) * input_scale * affine.broadcast(weight_scale, 1, acc.dim())
    if bias is not None:
        real = real + affine.broadcast(bias, 1, acc.dim())
    steps = torch.round(real * _quotient(1, scale) + zero_point)
    return torch.clamp(steps, grid.qmin, grid.qmax).to(torch.uint8)


def _quotient(a: float, b: float) -> float:
    """In float32, without a tensor that torch.export would see."""
    return float(np.float32(a) / np.float32(b))


def _combine(op: Op, args: list[Tensor], grids: list[Grid], grid: Grid) -> Tensor:
    """Ops over several values, each on its own grid."""
    if isinstance(op.attrs, ConcatAttrs):
        parts = [
            q if own is grid else _quantize(_dequantize(q, own), grid) for q, own in zip(args, grids, strict=True)
        ]
        return torch.cat(parts, op.attrs.dim)
    if op.kind is Kind.MATMUL:
        (s_a, z_a), (s_b, z_b) = (own.per_tensor() for own in grids)
        exact = args[0].shape[-1] * LARGEST_PRODUCT < EXACT_FLOAT32
        dtype = torch.float32 if exact else torch.float64
        acc = (args[0].to(dtype) - z_a) @ (args[1].to(dtype) - z_b)
        return _requantize(acc, s_a, torch.full((1,), s_b), None, grid)
    a, b = (_dequantize(q, own) for q, own in zip(args, grids, strict=True))
    return _quantize(a + b if op.kind is Kind.ADD else a * b, grid)


def _average(attrs: AveragePoolAttrs, q: Tensor, share: Tensor | None, q_grid: Grid, grid: Grid) -> Tensor:
    """Exact sums of integers, then the mean; `share` is the scale over the number of elements in each window."""
    scale, zero_point = q_grid.per_tensor()
    if attrs.kernel is None or share is None:
        area = int(q.shape[-2]) * int(q.shape[-1])
        dtype = torch.float32 if area * 255 < EXACT_FLOAT32 else torch.float64
        total = (q.to(dtype) - zero_point).sum((-2, -1), keepdim=True).to(torch.float32)
        return _quantize(total * _quotient(scale, area), grid)
    shifted = q.to(torch.float32) - zero_point
    total = F.avg_pool2d(shifted, attrs.kernel, attrs.stride, attrs.padding, divisor_override=1)
    return _quantize(total * share, grid)


def _counts(attrs: AveragePoolAttrs, shape: tuple[int | str, ...]) -> Tensor:
    """How many elements each mean is over: 0-d, or [1, 1, H_out, W_out] where padding does not count."""
    assert attrs.kernel is not None
    if attrs.count_include_pad:
        return torch.tensor(float(math.prod(attrs.kernel)))
    ones = torch.ones(1, 1, *(int(size) for size in shape[-2:]))
    return F.avg_pool2d(ones, attrs.kernel, attrs.stride, attrs.padding, divisor_override=1)


def _move(op: Op, x: Tensor, zero_point: int) -> Tensor:
    """What only moves integers, in uint8, which not every function of torch takes."""
    a = op.attrs
    if isinstance(a, MaxPoolAttrs):
        # Over floats, since inductor pads integers with what no uint8 holds.
        return move(op, x.to(torch.float32), zero_point).to(torch.uint8)
    if isinstance(a, ResizeAttrs):
        for dim, factor in enumerate(a.factors, 2):
            x = x.index_select(dim, torch.arange(x.shape[dim] * factor) // factor)
        return x
    if isinstance(a, PadAttrs) and a.mode != "constant":
        for dim, (before, after) in enumerate(a.padding):
            if before or after:
                x = x.index_select(dim, padding_index(a.mode, int(x.shape[dim]), before, after))
        return x
    return move(op, x, zero_point)
