"""XNNPACK spelling of ResNet's shortcut, see `shortcut.py`."""

from __future__ import annotations

import torch

from edgeqat.lowering.shortcut import Shortcut
from edgeqat.lowering.xnnpack_graph import ABSENT, Graph, Located
from edgeqat.lowering.xnnpack_ops import convolve2d
from edgeqat.op_attrs import ConvAttrs
from edgeqat.program import Grid, Kind, Op

__all__ = ["spell_shortcut"]


def spell_shortcut(graph: Graph, shortcut: Shortcut, x: Located, grid: Grid) -> Located:
    """Appends the conv."""
    weight = shortcut.weight(int(x.shape[1]))
    sizes = (-(-size // step) for size, step in zip(x.shape[2:], shortcut.stride, strict=True))
    conv = Op(Kind.CONV, (), ("shortcut",), ConvAttrs(shortcut.stride, ((0, 0), (0, 0)), (1, 1), 1))
    return convolve2d(graph, conv, x, weight, torch.ones(len(weight)), ABSENT, (x.shape[0], len(weight), *sizes), grid)
