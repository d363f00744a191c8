"""Images as the camera gives them: uint8 pixels p go in, and the first convolutions do the normalisation.

With r = (p - z) * s, where s is a power of two, so that float32 holds r exactly, and figures for each channel:

    (p / 255 - mean) / std = r * gain + offset      gain = 1 / (255 * s * std)      offset = (z / 255 - mean) / std

so that a convolution of weight W and bias b over normalised images is one over r of

    W' = W * gain      b' = b + sum of W * offset over all that one output reads

in float64, rounded once. Where it pads with zeros, r is 0 and the normalised image is `offset`, not 0. One integer z
pads all channels, and no z makes all offsets 0: the nearest pixel to the mean colour is taken. And s is the power
nearest to 1 / (255 * std), so that gains are near 1 and weights learn as they would over normalised images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from edgeqat.data.batches import normalise
from edgeqat.errors import InputError
from edgeqat.graph.form import USER_OP
from edgeqat.program import Grid, Origin

__all__ = [
    "NormalisePixels",
    "PixelFold",
    "Pixels",
    "insert_normalisation",
    "normalised_call",
    "takes_pixels",
]

aten = torch.ops.aten

WHITE, MIDDLE = 255, 128


@dataclass(frozen=True)
class Pixels:
    """How pixels become what the float model was trained on: (pixel / 255 - mean) / std.

    Attributes:
        mean: A figure for each channel, of images in 0..1.
        std: Likewise, above 0.

    Raises:
        InputError: They differ in number, or a figure is out of its range.
    """

    mean: Sequence[float]
    std: Sequence[float]

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            object.__setattr__(self, name, tuple(float(figure) for figure in getattr(self, name)))
        if not self.mean or len(self.mean) != len(self.std):
            raise InputError(
                f"found {len(self.mean)} means and {len(self.std)} stds, wanted one of each for every channel"
            )
        if not all(0 <= figure <= 1 for figure in self.mean):
            raise InputError(f"found the mean {list(self.mean)}, wanted figures in 0..1: those of pixels / 255")
        if not all(0 < figure < math.inf for figure in self.std):
            raise InputError(f"found the std {list(self.std)}, wanted figures above 0")

    def grid(self, symmetric: bool = False) -> Grid:
        """The grid whose integers are the pixels; its zero is the mean colour, or the middle if it is symmetric."""
        zero_point = MIDDLE if symmetric else round(WHITE * math.fsum(self.mean) / len(self.mean))
        exponent = round(math.fsum(-math.log2(WHITE * figure) for figure in self.std) / len(self.std))
        return Grid(0, WHITE, None, torch.tensor(2.0**exponent), torch.tensor(zero_point, dtype=torch.int32))

    def normalised(self, image: Tensor) -> Tensor:
        """float32 [N, C, H, W] of uint8 [N, C, H, W], to the bit as in training."""
        return normalise(image, self.mean, self.std)

    def fold(self, grid: Grid) -> PixelFold:
        """What convolutions over the integers of a grid of pixels do."""
        scale, zero_point = grid.per_tensor()
        mean, std = (torch.tensor(figures, dtype=torch.float64) for figures in (self.mean, self.std))
        return PixelFold(1 / (WHITE * scale * std), (zero_point / WHITE - mean) / std)


@dataclass(frozen=True, eq=False)
class PixelFold:
    """The normalisation as part of a convolution; the formulas stand at the top of this file.

    Attributes:
        gain: float64 [C].
        offset: float64 [C]: the normalised colour of zero padding, where the float model pads with 0.
    """

    gain: Tensor
    offset: Tensor

    @property
    def border_error(self) -> float:
        """How far zero padding is from 0, in the units of normalised images, in the worst channel."""
        return float(self.offset.abs().max())

    def weight(self, weight: Tensor) -> Tensor:
        """W' in float64, of W [C_out, C / groups, ...]."""
        return weight.detach().double() * self._for(weight, self.gain)

    def own_weight(self, folded: Tensor) -> Tensor:
        """W in float64, of W'."""
        return folded.detach().double() / self._for(folded, self.gain)

    def shift(self, weight: Tensor) -> Tensor:
        """b' - b in float64 [C_out], of W."""
        return (weight.detach().double() * self._for(weight, self.offset)).flatten(1).sum(1)

    def _for(self, weight: Tensor, figures: Tensor) -> Tensor:
        """A channel's figures beside its weights: [C_out, C / groups, 1, 1]."""
        outputs, inputs = weight.shape[:2]
        by_group = figures.to(weight.device).reshape(-1, inputs)
        return by_group.repeat_interleave(outputs // len(by_group), 0)[:, :, None, None]


class NormalisePixels(nn.Module):
    """uint8 [N, C, H, W] to normalised float32, where no convolution does it: a cast, a product and a sum."""

    gain: Tensor
    offset: Tensor

    def __init__(self, pixels: Pixels) -> None:
        super().__init__()
        mean, std = (
            torch.tensor(figures, dtype=torch.float64)[:, None, None] for figures in (pixels.mean, pixels.std)
        )
        self.register_buffer("gain", (1 / (WHITE * std)).float(), persistent=False)
        self.register_buffer("offset", (-mean / std).float(), persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        """Normalised images."""
        return image.to(torch.float32) * self.gain + self.offset


def takes_pixels(tensor: Tensor) -> bool:
    """Whether an input is an image of pixels: uint8 [N, C, H, W]."""
    return tensor.dtype == torch.uint8 and tensor.dim() == 4


def normalised_call(pixels: Pixels, args: Any, kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call of the float model: its images normalised, other inputs as they are.

    Raises:
        InputError: No input is an image, or one has another number of channels.
    """
    images = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if takes_pixels(leaf)]
    channels = len(pixels.mean)
    if not images:
        found = ", ".join(f"{leaf.dtype} {list(leaf.shape)}" for leaf in pytree.tree_leaves((args, kwargs)))
        raise InputError(f"found no image among the example inputs ({found}), wanted uint8 [N, {channels}, H, W]")
    for image in images:
        if image.shape[1] != channels:
            raise InputError(f"found an image {list(image.shape)}, wanted {channels} channels, one for each mean")

    def prepared(leaf: Tensor) -> Tensor:
        return pixels.normalised(leaf) if takes_pixels(leaf) else leaf

    call: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map(prepared, (args, kwargs))
    return call


def insert_normalisation(
    graph: fx.Graph, root: nn.Module, origins: dict[str, Origin], pixels: Pixels, given: Sequence[Tensor]
) -> None:
    """Makes the images among the graph's inputs uint8 ones, which a module under `root` normalises.

    Args:
        graph: Changed in place.
        root: Gets the module.
        origins: Gets an entry for each new node.
        pixels: The normalisation.
        given: The example inputs, in the order of the placeholders.
    """
    path = "normalise_pixels"
    while hasattr(root, path):
        path += "_"
    root.add_module(path, NormalisePixels(pixels))
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    for node in [n for n, tensor in zip(placeholders, given, strict=True) if takes_pixels(tensor)]:
        with graph.inserting_after(placeholders[-1]):
            made = graph.call_module(path, (node,))
        for user in list(node.users):
            if user is not made and user.target is not aten.sym_size.int:  # sizes are read from the input itself
                user.replace_input_with(node, made)
        made.meta = {"val": node.meta["val"], USER_OP: (made.name, path)}
        node.meta = {**node.meta, "val": node.meta["val"].to(torch.uint8)}
        origins[made.name] = Origin("", NormalisePixels.__name__, "normalise_pixels", "")
