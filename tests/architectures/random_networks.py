"""Small random networks as data, and a strategy that strings the layers of the table together.

Shapes are those of a sample, without the batch. A layer's result is found by running it on the meta device, so that
a network is valid whatever was drawn.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from architectures.layer_table import LAYERS, Shape

__all__ = ["Layer", "Network", "NetworkSpec", "network_specs"]

LARGEST = 768
"""Elements of a value: enough for every kernel's vector loop and its rest."""


@dataclass(frozen=True)
class Layer:
    """One layer: its kind in `LAYERS`, what was drawn for it, and what stands within it."""

    kind: str
    arguments: tuple[Any, ...] = ()
    branches: tuple[tuple[Layer, ...], ...] = ()


@dataclass(frozen=True)
class NetworkSpec:
    """A network: its input, its layers, and the one whose result is an output too, if any.

    Attributes:
        shape: Of a sample.
        layers: In order.
        early: Index of a layer, or None.
        seed: Of its weights and inputs.
    """

    shape: Shape
    layers: tuple[Layer, ...]
    early: int | None
    seed: int


class Joined(nn.Module):
    """Two branches from one value, and what makes one value of theirs."""

    def __init__(self, left: nn.Module, right: nn.Module, join: str) -> None:
        super().__init__()
        self.left, self.right, self.join = left, right, join

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.left(x), self.right(x)
        if self.join == "concat":
            return torch.cat([a, b], 1)
        return a + b if self.join == "add" else a * b if self.join == "mul" else a - b


class Network(nn.Module):
    """A drawn network."""

    def __init__(self, spec: NetworkSpec) -> None:
        super().__init__()
        self.early, shape = spec.early, spec.shape
        self.layers = nn.ModuleList()
        for layer in spec.layers:
            self.layers.append(build(layer, shape))
            shape = shape_after(layer, shape)

    def forward(self, x: Tensor) -> Any:
        results = []
        for layer in self.layers:
            x = layer(x)
            results.append(x)
        return x if self.early is None else {"early": results[self.early], "last": x}


def build(layer: Layer, shape: Shape) -> nn.Module:
    """The module of a layer that gets samples of this shape."""
    if layer.kind != "branches":
        return LAYERS[layer.kind].build(shape, *layer.arguments)
    left, right = (sequence(branch, shape) for branch in layer.branches)
    return Joined(left, right, *layer.arguments)


def sequence(layers: tuple[Layer, ...], shape: Shape) -> nn.Sequential:
    modules = []
    for layer in layers:
        modules.append(build(layer, shape))
        shape = shape_after(layer, shape)
    return nn.Sequential(*modules)


@functools.lru_cache(maxsize=4096)
def shape_after(layer: Layer, shape: Shape) -> Shape:
    """The shape of a sample behind a layer."""
    with torch.device("meta"), torch.no_grad():
        return tuple(build(layer, shape).eval()(torch.empty(2, *shape)).shape[1:])


def joins(a: Shape, b: Shape) -> list[str]:
    """What can be done with two values of these shapes."""
    if len(a) != len(b):
        return []
    found = ["concat"] if a[1:] == b[1:] else []
    if all(x == y or y == 1 for x, y in zip(a, b, strict=True)):
        found += ["add", "mul", "sub"]
    return found


START = ((3, 8, 8), (4, 5, 7), (8, 6, 6), (2, 12, 9), (6, 16), (5, 9), (12,))


@st.composite
def layers(draw: st.DrawFn, shape: Shape, least: int, most: int, depth: int) -> tuple[tuple[Layer, ...], Shape]:
    """Layers one after the other, fewer where values would become too large, and the shape behind them."""
    drawn: list[Layer] = []
    for _ in range(draw(st.integers(least, most))):
        if depth and draw(st.integers(0, 4)) == 4:
            layer = draw(branches(shape, depth - 1))
        else:
            kind = draw(st.sampled_from([kind for kind, entry in LAYERS.items() if entry.fits(shape)]))
            layer = Layer(kind, draw(LAYERS[kind].arguments(shape)))
        after = shape_after(layer, shape)
        if math.prod(after) > LARGEST:
            break
        drawn.append(layer)
        shape = after
    return tuple(drawn), shape


@st.composite
def branches(draw: st.DrawFn, shape: Shape, depth: int) -> Layer:
    """Two branches that can be joined; the first one is often the value itself."""
    left, a = draw(st.one_of(st.just(((), shape)), layers(shape, 1, 2, depth)))
    right, b = draw(layers(shape, 1, 3, depth))
    possible = joins(a, b)
    if not possible:  # shapes that do not go together: a value gated by itself instead
        left, right, possible = (), (Layer("function", ("sigmoid",)),), ["mul"]
    return Layer("branches", (draw(st.sampled_from(possible)),), (left, right))


@st.composite
def network_specs(draw: st.DrawFn) -> NetworkSpec:
    """A layer with weights, which integers begin with, and up to eight others, some of them branches."""
    shape = draw(st.sampled_from(START))
    kind = draw(st.sampled_from(["conv", "conv", "linear"] if len(shape) > 1 else ["linear"]))
    stem = Layer(kind, draw(LAYERS[kind].arguments(shape)))
    found, _ = draw(layers(shape_after(stem, shape), 2, 8, 2))
    early = draw(st.one_of(st.none(), st.integers(0, len(found))))
    return NetworkSpec(shape, (stem, *found), early, draw(st.integers(0, 3)))
