"""The table of ops in docs/ops.md: what each runs as on every target, read off plans of small models.

    python benchmarks/ops.py > docs/ops.md

Each op stands behind a conv, so that its inputs are integers, and is planned for every target.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import edgeqat as eq

TARGETS = ("onnxruntime", "torchscript", "executorch", "litert", "openvino", "aoti")
IMAGE, SEQUENCE, VOLUME, TOKENS = (2, 6, 8, 8), (2, 6, 24), (2, 6, 4, 4, 4), (2, 5, 6)
CONVS: Mapping[int, Callable[[], nn.Module]] = {
    3: lambda: nn.Conv1d(6, 6, 1),
    4: lambda: nn.Conv2d(6, 6, 1),
    5: lambda: nn.Conv3d(6, 6, 1),
}


@dataclass(frozen=True)
class Example:
    """One row: what the user writes.

    Attributes:
        function: The op, called with the layers and the output of the layer before it.
        layers: Modules that it needs.
        shape: Of the input.
    """

    function: Callable[[nn.ModuleList, Tensor], Tensor]
    layers: tuple[nn.Module, ...] = ()
    shape: tuple[int, ...] = IMAGE


@dataclass(frozen=True)
class Layer:
    """A row that is one module."""

    module: nn.Module
    shape: tuple[int, ...] = IMAGE

    def example(self) -> Example:
        """The same as an `Example`."""
        return Example(lambda m, x: m[0](x), (self.module,), self.shape)


class Behind(nn.Module):
    """An op behind a conv (or a linear, for tokens), whose output has a grid."""

    def __init__(self, example: Example) -> None:
        super().__init__()
        first = nn.Linear(6, 6) if example.shape == TOKENS else CONVS[len(example.shape)]()
        self.first, self.function = first, example.function
        self.layers = nn.ModuleList(example.layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.layers, self.first(x))


class Embedded(nn.Module):
    """An embedding: its input is integers of the user's own."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.last = nn.Embedding(10, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.table(x))


@dataclass
class Found:
    """What became of an op on one target."""

    kinds: list[str] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        if not self.reasons:
            return "integer"
        return ("partly integer: " if self.kinds else "float: ") + "; ".join(dict.fromkeys(self.reasons))


def _parameter(*shape: int) -> nn.Module:
    holder = nn.Module()
    holder.register_parameter("value", nn.Parameter(torch.rand(*shape)))
    return holder


GROUPS: Mapping[str, Mapping[str, Example | Layer]] = {
    "With weights": {
        "Conv1d": Layer(nn.Conv1d(6, 4, 3), SEQUENCE),
        "Conv2d, grouped, depthwise, dilated": Layer(nn.Conv2d(6, 6, 3, groups=6)),
        "Conv3d": Layer(nn.Conv3d(6, 4, 3), VOLUME),
        "ConvTranspose1d": Layer(nn.ConvTranspose1d(6, 4, 2, 2), SEQUENCE),
        "ConvTranspose2d": Layer(nn.ConvTranspose2d(6, 4, 2, 2)),
        "ConvTranspose2d with groups": Layer(nn.ConvTranspose2d(6, 6, 2, 2, groups=2)),
        "Linear": Example(lambda m, x: m[0](x.mean((2, 3))), (nn.Linear(6, 4),)),
        "Linear over tokens": Layer(nn.Linear(6, 4), TOKENS),
        "matmul, bmm of two values": Example(lambda m, x: x @ x.transpose(1, 2), (), SEQUENCE),
        "scaled_dot_product_attention": Example(
            lambda m, x: F.scaled_dot_product_attention(x, x.flip(3), x), (nn.Identity(),)
        ),
        "MultiheadAttention": Example(
            lambda m, x: m[0](x, x, x, need_weights=False)[0], (nn.MultiheadAttention(6, 2, batch_first=True),), TOKENS
        ),
        "BatchNorm behind one of these": Layer(nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6))),
        "BatchNorm on its own": Example(lambda m, x: m[0](torch.relu(x)), (nn.BatchNorm2d(6),)),
    },
    "Of two values or more": {
        "add": Example(lambda m, x: x + m[0](x), (nn.Conv2d(6, 6, 1),)),
        "add, broadcast": Example(lambda m, x: x + x.mean((2, 3), keepdim=True)),
        "add of a number": Example(lambda m, x: x + 3.0),
        "add of a parameter or buffer": Example(lambda m, x: x + m[0].value, (_parameter(6, 1, 1),)),
        "sub": Example(lambda m, x: x - m[0](x), (nn.Conv2d(6, 6, 1),)),
        "mul": Example(lambda m, x: x * m[0](x), (nn.Conv2d(6, 6, 1),)),
        "mul, broadcast": Example(lambda m, x: x * x.mean((2, 3), keepdim=True)),
        "mul, div by a number": Example(lambda m, x: x * 0.5),
        "mul by a parameter or buffer": Example(lambda m, x: x * m[0].value, (_parameter(6, 1, 1),)),
        "div of two values": Example(lambda m, x: x / (x + 2.0)),
        "cat": Example(lambda m, x: torch.cat([x, m[0](x)], 1), (nn.Conv2d(6, 3, 1),)),
        "stack": Example(lambda m, x: torch.stack([x, m[0](x)], 1), (nn.Conv2d(6, 6, 1),)),
        "FloatFunctional add": Example(lambda m, x: m[0].add(x, x), (nn.quantized.FloatFunctional(),)),
        "FloatFunctional add_relu": Example(lambda m, x: m[0].add_relu(x, x), (nn.quantized.FloatFunctional(),)),
        "FloatFunctional mul": Example(lambda m, x: m[0].mul(x, x), (nn.quantized.FloatFunctional(),)),
        "FloatFunctional cat": Example(lambda m, x: m[0].cat([x, x], 1), (nn.quantized.FloatFunctional(),)),
        "FloatFunctional add_scalar": Example(lambda m, x: m[0].add_scalar(x, 2.0), (nn.quantized.FloatFunctional(),)),
        "FloatFunctional mul_scalar": Example(lambda m, x: m[0].mul_scalar(x, 2.0), (nn.quantized.FloatFunctional(),)),
    },
    "Of each element": {
        "relu, relu6 behind conv, linear, add, mul, cat": Layer(nn.Sequential(nn.Conv2d(6, 6, 1), nn.ReLU6())),
        "relu elsewhere": Example(lambda m, x: torch.relu(F.max_pool2d(x, 2))),
        "relu6, hardtanh, clamp elsewhere": Example(lambda m, x: F.hardtanh(F.max_pool2d(x, 2))),
        "leaky_relu": Layer(nn.LeakyReLU(0.1)),
        "prelu": Layer(nn.PReLU(6)),
        "elu, selu, celu": Layer(nn.ELU()),
        "hardswish": Layer(nn.Hardswish()),
        "hardsigmoid": Layer(nn.Hardsigmoid()),
        "sigmoid": Layer(nn.Sigmoid()),
        "tanh": Layer(nn.Tanh()),
        "silu": Layer(nn.SiLU()),
        "gelu": Layer(nn.GELU()),
        "mish": Layer(nn.Mish()),
        "softplus": Layer(nn.Softplus()),
        "neg, abs, exp, square": Example(lambda m, x: torch.exp(-x.abs()) + x**2),
        "softmax": Layer(nn.Softmax(1)),
        "dropout": Layer(nn.Dropout(0.1)),
        "stochastic depth": Example(
            lambda m, x: x + (m[0](x) if not m.training else m[0](x) * torch.bernoulli(torch.ones(1))),
            (nn.Conv2d(6, 6, 1),),
        ),
    },
    "Norms": {
        "LayerNorm": Layer(nn.LayerNorm(6), TOKENS),
        "GroupNorm": Layer(nn.GroupNorm(2, 6)),
        "InstanceNorm2d": Layer(nn.InstanceNorm2d(6)),
    },
    "Pools and means": {
        "MaxPool2d": Layer(nn.MaxPool2d(2)),
        "MaxPool1d": Layer(nn.MaxPool1d(2), SEQUENCE),
        "AvgPool2d": Layer(nn.AvgPool2d(2)),
        "AvgPool1d": Layer(nn.AvgPool1d(2), SEQUENCE),
        "AdaptiveAvgPool2d to 1x1, to a divisor": Layer(nn.AdaptiveAvgPool2d(4)),
        "AdaptiveAvgPool2d to windows of different sizes": Layer(nn.AdaptiveAvgPool2d(5)),
        "AdaptiveAvgPool1d": Layer(nn.AdaptiveAvgPool1d(1), SEQUENCE),
        "mean over height and width": Example(lambda m, x: x.mean((2, 3))),
        "mean over time": Example(lambda m, x: x.mean(-1), (), SEQUENCE),
        "mean over other dimensions": Example(lambda m, x: x.mean(1)),
    },
    "Moving elements": {
        "interpolate, nearest, whole factor": Example(lambda m, x: F.interpolate(x, scale_factor=2)),
        "interpolate, bilinear": Example(lambda m, x: F.interpolate(x, scale_factor=2, mode="bilinear")),
        "PixelShuffle, PixelUnshuffle": Example(lambda m, x: F.pixel_unshuffle(x, 2)),
        "channel_shuffle": Example(lambda m, x: F.channel_shuffle(x, 2)),
        "pad: zeros, reflect, replicate, circular": Example(lambda m, x: F.pad(x, (1, 1, 1, 1), "reflect")),
        "pad with another number": Example(lambda m, x: F.pad(x, (1, 1), value=1.0)),
        "slice, select, chunk, split, unbind": Example(lambda m, x: x.chunk(2, 1)[1][:, 0]),
        "roll": Example(lambda m, x: torch.roll(x, 2, 3)),
        "flip": Example(lambda m, x: x.flip(3)),
        "reshape, view, flatten, squeeze, unsqueeze": Example(lambda m, x: x.flatten(1)),
        "permute, transpose": Example(lambda m, x: x.permute(0, 2, 3, 1)),
        "expand": Example(lambda m, x: x.mean((2, 3), keepdim=True).expand(-1, -1, 4, 4)),
    },
}


def outcome(model: nn.Module, x: Tensor, target: str) -> Found:
    """What the plan for a target says of the ops behind the first."""
    found = Found()
    for row in eq.plan(model.eval(), x, target).rows():
        if row.module.startswith(("first ", "last ")) or row.kind in ("quantize", "dequantize"):
            continue
        if row.runs == "float":
            found.reasons.append(row.reason)
        else:
            found.kinds.append(row.kind)
    # What follows from another reason is no reason.
    own = [reason for reason in found.reasons if reason != "its input is float"]
    found.reasons = own if own else found.reasons
    return found


def main() -> None:
    """Prints the whole file."""
    print("# Ops\n")
    print("What each op runs as behind an integer layer, on every target: generated by `python benchmarks/ops.py`.")
    print('"float" means a float island of its own: dequantize, the op, quantize. Its reason stands in every plan.')
    print("Integer does not mean faster: functions of each element are tables, which some runtimes are slow at")
    print("where no kernel of theirs gives the very integers ([limits](limits.md)).")
    for title, rows in GROUPS.items():
        print(f"\n## {title}\n\n| op | " + " | ".join(TARGETS) + " |\n| --- |" + " --- |" * len(TARGETS))
        for name, row in rows.items():
            example = row.example() if isinstance(row, Layer) else row
            torch.manual_seed(0)
            cells = [str(outcome(Behind(example), torch.randn(example.shape), target)) for target in TARGETS]
            print(f"| {name} | " + " | ".join(cells) + " |")
        if title == "Moving elements":
            tokens = torch.zeros(2, 5, dtype=torch.int64)
            cells = [str(outcome(Embedded(), tokens, target)) for target in TARGETS]
            print("| embedding | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
