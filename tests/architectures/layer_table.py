"""The table of layers that random networks are made of: what each needs of a shape, what is drawn for it, its module.

Shapes are those of a sample, without the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

__all__ = ["FUNCTIONS", "LAYERS", "Shape"]

Shape: TypeAlias = tuple[int, ...]


@dataclass(frozen=True)
class Entry:
    """A kind of layer.

    Attributes:
        fits: Whether it takes a sample of this shape.
        arguments: What is drawn for it.
        build: Its module, from the shape and what was drawn.
    """

    fits: Callable[[Shape], bool]
    arguments: Callable[[Shape], st.SearchStrategy[tuple[Any, ...]]]
    build: Callable[..., nn.Module]


class Call(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class WithConstant(nn.Module):
    """Adds or multiplies a parameter or buffer, on either side."""

    def __init__(self, shape: Shape, op: str, per_channel: bool, trained: bool) -> None:
        super().__init__()
        size = (shape[0], *[1] * (len(shape) - 1)) if per_channel else shape
        value = torch.randn(size)
        if trained:
            self.value = nn.Parameter(value)
        else:
            self.register_buffer("value", value)
        self.op = op

    def forward(self, x: Tensor) -> Tensor:
        return {"add": x + self.value, "mul": self.value * x, "sub": x - self.value}[self.op]


FUNCTIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "sigmoid": torch.sigmoid,
    "hardsigmoid": F.hardsigmoid,
    "tanh": torch.tanh,
    "silu": F.silu,
    "hardswish": F.hardswish,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "leaky_relu": lambda x: F.leaky_relu(x, 0.1),
    "elu": F.elu,
    "selu": F.selu,
    "mish": F.mish,
    "softplus": F.softplus,
    "clamp": lambda x: x.clamp(-0.75, 1.25),
    "neg": torch.neg,
    "abs": torch.abs,
    "square": torch.square,
    "twice": lambda x: x * x,
}

NUMBERS: Mapping[str, Callable[[Tensor, float], Tensor]] = {
    "add": lambda x, v: x + v,
    "mul": lambda x, v: x * v,
    "div": lambda x, v: x / v,
    "from": lambda x, v: v - x,
}

FLOATS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda x: F.softmax(x, -1),
    "layer_norm": lambda x: F.layer_norm(x, x.shape[-1:]),
}
"""Float by design: what follows them starts from a runtime's own float results."""


def of_rank(*ranks: int) -> Callable[[Shape], bool]:
    return lambda shape: len(shape) in ranks


def plain(fits: Callable[[Shape], bool], function: Callable[[Tensor], Tensor]) -> Entry:
    """An entry for which nothing is drawn."""
    return Entry(fits, lambda shape: st.just(()), lambda shape: Call(function))


def _conv_arguments(shape: Shape) -> st.SearchStrategy[tuple[Any, ...]]:
    strides = [1, 2] if min(shape[1:]) >= 4 else [1]
    channels = st.sampled_from([shape[0], 4, 6, 8])
    activations = st.sampled_from([None, "relu", "relu6", "silu"])
    flags = (st.booleans(), st.booleans(), st.booleans())  # depthwise, with bias, with norm
    return st.tuples(channels, st.sampled_from([1, 3]), st.sampled_from(strides), *flags, activations)


def _conv(
    shape: Shape, c_out: int, kernel: int, stride: int, depthwise: bool, bias: bool, norm: bool, activation: str | None
) -> nn.Module:
    c_in = shape[0]
    make: Any = nn.Conv1d if len(shape) == 2 else nn.Conv2d
    c_out = 2 * c_in if depthwise and c_out > c_in else c_in if depthwise else c_out
    conv = make(c_in, c_out, kernel, stride, kernel // 2, groups=c_in if depthwise else 1, bias=bias)
    after = [_norm((c_out, *shape[1:]))] if norm else []
    return nn.Sequential(conv, *after, *([] if activation is None else [Call(FUNCTIONS[activation])]))


def _norm(shape: Shape) -> nn.Module:
    return nn.BatchNorm2d(shape[0]) if len(shape) == 3 else nn.BatchNorm1d(shape[0])


def _pool(shape: Shape, kind: str, kernel: int, stride: int, padding: int) -> nn.Module:
    pools: dict[tuple[str, int], Any] = {
        ("max", 2): nn.MaxPool1d,
        ("max", 3): nn.MaxPool2d,
        ("average", 2): nn.AvgPool1d,
        ("average", 3): nn.AvgPool2d,
    }
    return pools[kind, len(shape)](kernel, stride, padding)


def _roll(shape: Shape, dim: int, shift: int) -> nn.Module:
    return Call(lambda x: torch.roll(x, shift, dim))


def _pad(shape: Shape, before: int, after: int, mode: str) -> nn.Module:
    sides = (before, after) if len(shape) == 2 else (before, after, after, before)
    return Call(lambda x: F.pad(x, sides, mode=mode))


def _permute(shape: Shape, dims: Shape) -> nn.Module:
    return Call(lambda x: x.permute(0, *(d + 1 for d in dims)))


def _slice(shape: Shape, dim: int, start: int, step: int) -> nn.Module:
    index = [slice(None)] * dim + [slice(start, None, step)]
    return Call(lambda x: x[tuple(index)])


def _split(shape: Shape, how: str, dim: int) -> nn.Module:
    """The parts of a value in another order."""
    if how == "chunk":
        return Call(lambda x: torch.cat(x.chunk(2, dim)[::-1], dim))
    if how == "unbind":
        return Call(lambda x: torch.stack(x.unbind(dim)[::-1], dim))
    sizes = [1, shape[dim - 1] - 1]
    return Call(lambda x: torch.cat(x.split(sizes, dim)[::-1], dim))


def _shuffle(x: Tensor) -> Tensor:
    n, c, *rest = x.shape
    return x.view(n, 2, c // 2, *rest).transpose(1, 2).reshape(n, c, *rest)


def _dims(shape: Shape) -> st.SearchStrategy[int]:
    return st.integers(1, len(shape))


def _even(dim: int) -> Callable[[Shape], bool]:
    return lambda shape: len(shape) == 3 and shape[dim] % 2 == 0


LAYERS: Mapping[str, Entry] = {
    "conv": Entry(of_rank(2, 3), _conv_arguments, _conv),
    "conv_transpose": Entry(
        lambda shape: len(shape) == 3 and max(shape[1:]) <= 8,
        lambda shape: st.tuples(
            st.sampled_from([3, 4]), st.sampled_from([(2, 2, 0, 0), (3, 2, 1, 1), (4, 2, 1, 0), (3, 1, 1, 0)])
        ),
        lambda shape, c_out, windows: nn.ConvTranspose2d(shape[0], c_out, *windows),
    ),
    "linear": Entry(
        of_rank(1, 2, 3),
        lambda shape: st.tuples(st.sampled_from([4, 6, 8]), st.booleans()),
        lambda shape, c_out, bias: nn.Linear(shape[-1], c_out, bias),
    ),
    "batch_norm": Entry(of_rank(1, 2, 3), lambda shape: st.just(()), _norm),
    "function": Entry(
        of_rank(1, 2, 3),
        lambda shape: st.tuples(st.sampled_from(sorted(FUNCTIONS))),
        lambda shape, name: Call(FUNCTIONS[name]),
    ),
    "number": Entry(
        of_rank(1, 2, 3),
        lambda shape: st.tuples(st.sampled_from(sorted(NUMBERS)), st.sampled_from([-1.5, 0.375, 3.0])),
        lambda shape, op, value: Call(lambda x: NUMBERS[op](x, value)),
    ),
    "constant": Entry(
        of_rank(1, 2, 3),
        lambda shape: st.tuples(st.sampled_from(["add", "mul", "sub"]), st.booleans(), st.booleans()),
        WithConstant,
    ),
    "pool": Entry(
        lambda shape: len(shape) in (2, 3) and min(shape[1:]) >= 3,
        lambda shape: st.tuples(
            st.sampled_from(["max", "average"]), st.sampled_from([2, 3]), st.sampled_from([1, 2]), st.integers(0, 1)
        ),
        _pool,
    ),
    "global_pool": Entry(
        of_rank(2, 3),
        lambda shape: st.just(()),
        lambda shape: nn.AdaptiveAvgPool2d(1) if len(shape) == 3 else nn.AdaptiveAvgPool1d(1),
    ),
    "mean": plain(of_rank(2, 3), lambda x: x.mean(list(range(2, x.dim())))),
    "interpolate": plain(
        lambda shape: len(shape) in (2, 3) and math.prod(shape) <= 192, lambda x: F.interpolate(x, scale_factor=2)
    ),
    "pixel_shuffle": plain(lambda s: len(s) == 3 and s[0] % 4 == 0, lambda x: F.pixel_shuffle(x, 2)),
    "pixel_unshuffle": plain(lambda s: _even(1)(s) and _even(2)(s), lambda x: F.pixel_unshuffle(x, 2)),
    "channel_shuffle": plain(_even(0), _shuffle),
    "roll": Entry(of_rank(1, 2, 3), lambda shape: st.tuples(_dims(shape), st.sampled_from([-2, 1, 5])), _roll),
    "split": Entry(
        lambda shape: min(shape) >= 2,
        lambda shape: st.tuples(st.sampled_from(["chunk", "split", "unbind"]), _dims(shape)),
        _split,
    ),
    "select": Entry(
        of_rank(2, 3),
        lambda shape: _dims(shape).map(lambda dim: (dim,)),
        lambda shape, dim: Call(lambda x: x.select(dim, -1)),
    ),
    "stack": Entry(
        of_rank(1, 2),
        lambda shape: _dims(shape).map(lambda dim: (dim,)),
        lambda shape, dim: Call(lambda x: torch.stack([x, torch.tanh(x)], dim)),
    ),
    "slice": Entry(
        lambda shape: min(shape) >= 2,
        lambda shape: st.tuples(_dims(shape), st.integers(0, 1), st.integers(1, 2)),
        _slice,
    ),
    "pad": Entry(
        lambda shape: len(shape) in (2, 3) and min(shape[1:]) >= 2,
        lambda shape: st.tuples(
            st.integers(0, 1), st.integers(0, 1), st.sampled_from(["constant", "reflect", "replicate", "circular"])
        ),
        _pad,
    ),
    "permute": Entry(
        of_rank(2, 3),
        lambda shape: st.permutations(range(len(shape))).map(lambda dims: (tuple(dims),)),
        _permute,
    ),
    "flatten": Entry(
        of_rank(2, 3),
        lambda shape: st.tuples(st.integers(1, len(shape) - 1)),
        lambda shape, dim: nn.Flatten(dim),
    ),
    "expand": Entry(
        of_rank(1, 2, 3),
        lambda shape: st.tuples(st.booleans()),
        lambda shape, like: Call(lambda x: x[..., :1].expand_as(x) if like else x[..., :1].expand(-1, *shape)),
    ),
    "matmul": plain(of_rank(2, 3), lambda x: x @ x.transpose(-2, -1)),
    "float": Entry(
        of_rank(1, 2, 3),
        lambda shape: st.tuples(st.sampled_from(sorted(FLOATS))),
        lambda shape, name: Call(FLOATS[name]),
    ),
}
"""Every kind of layer; "branches" stands beside them, whose layers are drawn in turn."""
