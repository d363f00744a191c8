"""Padding with elements of the tensor itself, for runtimes that have no such op on integers."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["padding_index"]


def padding_index(mode: str, size: int, before: int, after: int) -> Tensor:
    """Which elements of a dimension its padded form holds, int64 [before + size + after].

    Args:
        mode: "reflect", "replicate" or "circular".
        size: Of the dimension.
        before: Elements in front.
        after: Elements behind.
    """
    index = torch.arange(-before, size + after)
    if mode == "reflect":
        return (size - 1) - ((size - 1) - index.abs()).abs()
    return index.clamp(0, size - 1) if mode == "replicate" else index % size
