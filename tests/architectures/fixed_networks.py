"""Networks that hold every kind of layer and every function, and those that random ones once failed on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from architectures.layer_table import FUNCTIONS, Shape
from architectures.random_networks import Layer, NetworkSpec

__all__ = ["FIXED"]


def spec(shape: Shape, *layers: Layer, early: int | None = None) -> NetworkSpec:
    return NetworkSpec(shape, layers, early, 0)


def layer(kind: str, *arguments: Any) -> Layer:
    return Layer(kind, arguments)


def joined(join: str, left: tuple[Layer, ...], right: tuple[Layer, ...]) -> Layer:
    return Layer("branches", (join,), (left, right))


def conv(channels: int, stride: int = 1, depthwise: bool = False, activation: str | None = None) -> Layer:
    return layer("conv", channels, 3, stride, depthwise, False, True, activation)


LINEAR = layer("linear", 6, True)

FIXED: Mapping[str, NetworkSpec] = {
    "image": spec(
        (3, 8, 8),
        conv(8, activation="relu6"),
        joined("add", (), (conv(8, depthwise=True, activation="silu"), layer("batch_norm"))),
        layer("pool", "max", 3, 2, 1),
        layer("conv_transpose", 4, (3, 2, 1, 1)),
        layer("pool", "average", 2, 2, 0),
        layer("interpolate"),
        joined("mul", (), (layer("global_pool"), LINEAR, layer("slice", 3, 0, 8), layer("function", "hardsigmoid"))),
        layer("global_pool"),
        layer("flatten", 1),
        LINEAR,
        early=2,
    ),
    "moving": spec(
        (3, 8, 8),
        conv(8),
        layer("channel_shuffle"),
        layer("pixel_shuffle"),
        layer("pixel_unshuffle"),
        layer("split", "chunk", 1),
        layer("split", "split", 2),
        layer("split", "unbind", 3),
        layer("roll", 2, -2),
        layer("slice", 1, 1, 2),
        layer("expand", False),
        layer("permute", (1, 0, 2)),
        layer("select", 3),
        layer("stack", 1),
        layer("mean"),
        LINEAR,
    ),
    "expand_as": spec((3, 8, 8), conv(4), joined("mul", (), (layer("expand", True),))),
    "padding": spec(
        (4, 5, 7), conv(4), *(layer("pad", 1, 0, m) for m in ("constant", "reflect", "replicate", "circular")), conv(4)
    ),
    "signal": spec(
        (6, 16),
        conv(8, activation="relu"),
        layer("pool", "max", 2, 2, 0),
        layer("interpolate"),
        layer("pool", "average", 3, 1, 1),
        joined("concat", (conv(4),), (conv(2, depthwise=True), layer("function", "relu"))),
        layer("global_pool"),
        layer("flatten", 1),
        LINEAR,
    ),
    "matrices": spec(
        (5, 9),
        LINEAR,
        *(
            layer("constant", op, channels, trained)
            for op, channels, trained in (
                ("add", True, True),
                ("mul", False, True),
                ("sub", True, False),
                ("mul", True, False),
            )
        ),
        *(layer("number", op, -1.5) for op in ("add", "mul", "div", "from")),
        layer("matmul"),
        joined("sub", (), (layer("permute", (1, 0)),)),
        layer("float", "softmax"),
        LINEAR,
        layer("float", "layer_norm"),
    ),
    "vector": spec((12,), LINEAR, layer("function", "tanh"), layer("batch_norm"), joined("add", (), (LINEAR,))),
    "functions": spec((12,), *(each for name in FUNCTIONS for each in (LINEAR, layer("function", name)))),
    # What random networks found.
    "a parameter taken from a value": spec((4, 5, 7), conv(4), layer("constant", "sub", False, True)),
}
"""By what they hold."""
