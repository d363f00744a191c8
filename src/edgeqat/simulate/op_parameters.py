"""Which parameters of a simulation an op computes with."""

from __future__ import annotations

from dataclasses import dataclass

from edgeqat.graph.pixels import PixelFold

__all__ = ["OpParameters"]


@dataclass(frozen=True)
class OpParameters:
    """Dotted names below the simulation of what a conv or linear computes with.

    Attributes:
        weight: The weight; folded with its batch norm, unless that is live.
        bias: The bias, likewise; None for none.
        norm: The live batch norm behind it, which convert folds; None where there is none (any more).
        pixels: The normalisation of pixels that weight and bias hold; None where it reads something else.
    """

    weight: str
    bias: str | None
    norm: str | None
    pixels: PixelFold | None = None
