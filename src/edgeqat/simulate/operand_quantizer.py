"""The quantizer of a parameter or buffer that values are added to or multiplied with: its grid follows it."""

from __future__ import annotations

import torch
from torch import Tensor

from edgeqat import affine
from edgeqat.simulate.fake_quant import ActivationQuantizer
from edgeqat.simulate.gradients import straight_through

__all__ = ["OperandQuantizer"]


class OperandQuantizer(ActivationQuantizer):
    """Puts an operand on the grid of its own extremes, taken afresh in every step, as weights are.

    A grid frozen by calibration would hold a parameter to the range that it happened to begin with: zeros for ever,
    for a layer scale that begins at zero.
    """

    def follow(self, x: Tensor) -> None:
        """Gives it the grid over x's extremes."""
        with torch.no_grad():
            values = x.detach().double()
            scale, zero_point = affine.range_qparams(
                values.amin(),
                values.amax(),
                self.qmin,
                self.qmax,
                symmetric=self.symmetric,
                power_of_two=self.power_of_two,
            )
            self.scale.copy_(scale)
            self.get_buffer("zero_point").copy_(zero_point)

    def quantize(self, x: Tensor) -> Tensor:
        """x on the grid, in x's dtype; its gradient passes unchanged."""
        self.follow(x)
        with torch.no_grad():
            zero_point = self.get_buffer("zero_point")
            quantized = affine.fake_quantize(x.float(), self.scale, zero_point, self.qmin, self.qmax).to(x.dtype)
        return straight_through(x, quantized)
