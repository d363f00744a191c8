"""ResNet's shortcut without parameters, every n-th pixel and new channels of zeros, as one conv.

Its weights are 0 and 1 at a scale of 1, and its output has its input's grid, so that each sum is one integer,
multiplied by exactly 1: it moves integers, as the slices and the padding do, in one op instead of several.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from edgeqat.op_attrs import PadAttrs, SliceAttrs
from edgeqat.program import Kind, Op

__all__ = ["Shortcut", "find_shortcuts"]


@dataclass(frozen=True)
class Shortcut:
    """A padding of channels behind slices of pixels.

    Attributes:
        source: The value that is sliced.
        inside: The values between it and the padding.
        stride: Of the slices, (height, width).
        new_channels: Zeros (in front, behind).
    """

    source: str
    inside: tuple[str, ...]
    stride: tuple[int, int]
    new_channels: tuple[int, int]

    def weight(self, channels: int) -> Tensor:
        """int8 [front + channels + behind, channels, 1, 1]."""
        front, behind = self.new_channels
        made = torch.zeros(front + channels + behind, channels, 1, 1, dtype=torch.int8)
        made[front + torch.arange(channels), torch.arange(channels)] = 1
        return made


def find_shortcuts(ops: Sequence[Op]) -> dict[str, Shortcut]:
    """Every shortcut, by the name of its padding."""
    makers = {op.name: op for op in ops}
    found: dict[str, Shortcut] = {}
    for op in ops:
        if not isinstance(op.attrs, PadAttrs) or op.attrs.mode != "constant" or len(op.attrs.padding) != 4:
            continue
        if any(pair != (0, 0) for i, pair in enumerate(op.attrs.padding) if i != 1):
            continue
        name, stride, inside = op.inputs[0], [1, 1], []
        while name in makers and (step := _every_nth(makers[name])) is not None:
            inside.append(name)
            stride[step[0] - 2] *= step[1]
            name = makers[name].inputs[0]
        if inside:
            found[op.name] = Shortcut(name, tuple(inside), (stride[0], stride[1]), op.attrs.padding[1])
    return found


def _every_nth(op: Op) -> tuple[int, int] | None:
    """(dimension, n) of a slice that takes every n-th row or column from the first on."""
    a = op.attrs
    if op.kind is not Kind.SLICE or not isinstance(a, SliceAttrs):
        return None
    return (a.dim, a.step) if a.dim in (2, 3) and a.start == 0 and a.stop is None else None
