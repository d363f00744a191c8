"""The quantizer of an input that takes pixels: its grid is known, and its integers are the pixels themselves."""

from __future__ import annotations

import torch
from torch import Tensor

from edgeqat.program import Grid
from edgeqat.qconfig import ActivationConfig
from edgeqat.simulate.fake_quant import ActivationQuantizer

__all__ = ["PixelQuantizer"]


class PixelQuantizer(ActivationQuantizer):
    """Gives the real numbers of pixels, in every mode: there is nothing to round and nothing to calibrate."""

    def __init__(self, name: str, config: ActivationConfig, grid: Grid) -> None:
        super().__init__(name, config)
        self.set_grid(*grid.filled())

    def start_observing(self) -> None:
        """Nothing: the grid stands."""

    def settle(self) -> None:
        """Nothing: the grid stands."""

    def forward(self, image: Tensor) -> Tensor:
        """Of uint8 pixels: scale * (pixel - zero_point) in float32, exactly."""
        scale, zero_point = self.grid()
        return (image.to(torch.float32) - zero_point) * scale
