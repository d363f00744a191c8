"""Samples of what a conv or linear layer reads and gives, so that it becomes a product of matrices.

A conv computes each of its outputs from a window of its input. A few windows of every image, drawn at random, say as
much about the rounding of its weights as all of them, at a small part of the cost.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from edgeqat.op_attrs import ConvAttrs, LinearAttrs

__all__ = ["Samples", "as_matrix", "draw"]


@dataclass(frozen=True, eq=False)
class Samples:
    """P windows of a layer with G groups of O outputs, each over K inputs.

    Attributes:
        inputs: float32 [P, G, K].
        targets: float32 [P, G, O].
    """

    inputs: Tensor
    targets: Tensor

    def take(self, indices: Tensor) -> Samples:
        """Those at `indices`, int64 [N]."""
        return Samples(self.inputs[indices], self.targets[indices])


def as_matrix(weight: Tensor, attrs: ConvAttrs | LinearAttrs) -> Tensor:
    """A layer's weight [G * O, ...] as [G, O, K]; a view."""
    groups = attrs.groups if isinstance(attrs, ConvAttrs) else 1
    return weight.reshape(groups, weight.shape[0] // groups, -1)


def draw(
    attrs: ConvAttrs | LinearAttrs,
    kernel: Sequence[int],
    inputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    positions: int,
    generator: Generator,
) -> Samples:
    """Draws `positions` windows of each sample, with replacement; all where there are no more.

    Args:
        attrs: The layer's.
        kernel: Its window, one size a spatial dimension; empty for a linear layer.
        inputs: Of every batch, [N, C, ...]; of a linear layer [N, ..., K].
        targets: What it should give for each, [N, O, ...]; of a linear layer [N, ..., O].
        positions: Windows a sample.
        generator: On the CPU.
    """
    found = []
    for x, target in zip(inputs, targets, strict=True):
        if isinstance(attrs, LinearAttrs):
            found.append(_rows(x, target, positions, generator))
        else:
            found.append(_windows(attrs, kernel, x, target, positions, generator))
    return Samples(torch.cat([s.inputs for s in found]), torch.cat([s.targets for s in found]))


def _rows(x: Tensor, target: Tensor, positions: int, generator: Generator) -> Samples:
    """Rows of a linear layer: those of all samples of a batch are one heap."""
    rows, results = x.reshape(-1, 1, x.shape[-1]), target.reshape(-1, 1, target.shape[-1])
    wanted = x.shape[0] * positions
    if wanted >= len(rows):
        return Samples(rows, results)
    chosen = torch.randint(len(rows), (wanted,), generator=generator).to(x.device)
    return Samples(rows[chosen], results[chosen])


def _windows(
    attrs: ConvAttrs, kernel: Sequence[int], x: Tensor, target: Tensor, positions: int, generator: Generator
) -> Samples:
    n, sizes = len(x), target.shape[2:]
    total = math.prod(sizes)
    if positions < total:
        places = torch.randint(total, (n, positions), generator=generator)
    else:
        places = torch.arange(total).expand(n, total)
    sample = torch.arange(n).reshape(-1, 1).expand_as(places).reshape(-1).to(x.device)
    places = places.reshape(-1).to(x.device)
    pads = itertools.chain.from_iterable(reversed(attrs.padding))
    padded = F.pad(x, tuple(pads))
    columns = _columns(attrs, kernel, sizes, padded.shape[2:], places)
    # Indices on both sides of a slice put their dimensions in front: [P, K', C].
    windows = padded.flatten(2)[sample[:, None], :, columns].transpose(1, 2)
    results = target.flatten(2)[sample, :, places]
    return Samples(windows.reshape(len(windows), attrs.groups, -1), results.reshape(len(results), attrs.groups, -1))


def _columns(
    attrs: ConvAttrs, kernel: Sequence[int], sizes: Sequence[int], padded: Sequence[int], places: Tensor
) -> Tensor:
    """Flat indices into a padded image of the window behind each place in the output: [P] -> [P, K']."""
    columns = torch.zeros(len(places), 1, dtype=torch.int64, device=places.device)
    rest = math.prod(sizes)
    for k, size, wide, stride, dilation in zip(kernel, sizes, padded, attrs.stride, attrs.dilation, strict=True):
        rest //= size
        start = (places // rest % size) * stride
        along = start[:, None] + dilation * torch.arange(k, device=places.device)
        columns = (columns[:, :, None] * wide + along[:, None, :]).flatten(1)
    return columns
