"""The quantizers of a simulation's parameters: weights on symmetric grids, biases on int32."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edgeqat import affine
from edgeqat.program import Grid
from edgeqat.qconfig import WeightConfig
from edgeqat.simulate.fake_quant import FREEDOM, ActivationQuantizer, Quantizer
from edgeqat.simulate.gradients import (
    Integers,
    fake_quantize,
    learned_fake_quantize,
    learned_parameter,
    lsq_factor,
    quantize_bias,
    quantize_parameter,
)
from edgeqat.simulate.weight_scales import weight_scale

__all__ = ["BiasQuantizer", "HeldIntegers", "WeightQuantizer"]


@dataclass(frozen=True, eq=False)
class HeldIntegers:
    """Weights that training has frozen at an integer: their real value is that integer times the scale of now.

    Attributes:
        mask: Which they are: bool, the weight's shape.
        integers: int8, the weight's shape; what is outside of the mask does not count.
    """

    mask: Tensor
    integers: Tensor

    def put_into(self, weight: Tensor, scale: Tensor, axis: int | None) -> Tensor:
        """The weight with these in it; their gradient goes to the scale, and none to the weight."""
        return torch.where(self.mask, self.integers * affine.broadcast(scale, axis, weight.dim()), weight)


class WeightQuantizer(Quantizer):
    """Puts a weight on its symmetric grid.

    With the observer "minmax" the scale follows the weight, so that nothing is ever clipped; with another observer
    calibration finds it, and it stays; learned, it starts from what calibration found.

    Attributes:
        min_scale: float32, [C] or 0-d: what calibration found the scale must not go below, so that biases fit
            int32 even in channels whose weights are (almost) zero; or the observer's `eps`, if that is larger.
        scale: float32, [C] or 0-d, NaN until calibrated; only where the scale does not follow the weight.
        limits: float32, [2, C] or [2]: smallest and largest scale, where it is learned.
        power_of_two: Whether the scale is the next power of two that is not smaller than what was found.
        held: Weights that are frozen at their integers while `fit` runs; None for none.
    """

    min_scale: Tensor
    scale: Tensor
    limits: Tensor

    def __init__(
        self, name: str, config: WeightConfig, grid: Grid, weight: Tensor, power_of_two: bool = False
    ) -> None:
        super().__init__(name)
        self.power_of_two = power_of_two
        self.held: HeldIntegers | None = None
        self.config, self.qmax, self.axis = config, grid.qmax, grid.axis
        self.integers = Integers(-grid.qmax, grid.qmax, grid.axis)
        self.follows = config.observer == "minmax" and not config.learned
        shape = () if grid.axis is None else (weight.shape[grid.axis],)
        smallest = config.arguments.get("eps", affine.SCALE_FLOOR)
        self.register_buffer("min_scale", torch.full(shape, max(smallest, affine.SCALE_FLOOR)))
        if config.learned:
            self.scale = nn.Parameter(torch.full(shape, math.nan))
            self.register_buffer("limits", torch.full((2, *shape), math.nan))
        elif not self.follows:
            self.register_buffer("scale", torch.full(shape, math.nan))

    @property
    def calibrated(self) -> bool:
        """Whether it has a grid."""
        return self.follows or bool(torch.isfinite(self.scale.detach()).all())

    def settle(self, weight: Tensor) -> None:
        """Finds the scale that stays, or that learning starts from."""
        if not self.follows:
            with torch.no_grad():
                percentile = self.config.arguments.get("percentile", 99.99)
                self.scale.copy_(weight_scale(weight.detach(), self.config.observer, self.qmax, self.axis, percentile))
                if self.config.learned:
                    self.limits.copy_(torch.stack([self.scale / FREEDOM, self.scale * FREEDOM]))

    def scale_of(self, weight: Tensor) -> Tensor:
        """The scale for the weights as they are: float32, [C] or 0-d, without gradient."""
        if self.config.learned:
            return self.scale.detach().clamp(*self._range())
        if self.follows:
            scale = affine.symmetric_scale(weight, self.qmax, self.axis, self.min_scale)
        else:
            scale = torch.maximum(self.scale, self.min_scale)
        return affine.power_of_two_above(scale) if self.power_of_two else scale

    def _range(self) -> tuple[Tensor, Tensor]:
        """Smallest and largest learned scale."""
        low = torch.maximum(self.limits[0], self.min_scale)
        return low, torch.maximum(self.limits[1], low)

    def integers_of(self, weight: Tensor) -> Tensor:
        """The integers of the weights as they are: int8, their shape, without gradient."""
        scale = self.scale_of(weight)
        zero = torch.zeros_like(scale, dtype=torch.int32)
        return affine.quantize(weight.detach(), scale, zero, -self.qmax, self.qmax, self.axis).to(torch.int8)

    def settle_held(self, weight: Tensor) -> None:
        """Moves the held weights, in place, to where their integers are on the present scale."""
        if self.held is not None:
            with torch.no_grad():
                # A scale that follows the weight follows the free ones; a held one that momentum moved must not count.
                scale = self.scale_of(weight.masked_fill(self.held.mask, 0.0))
                weight.copy_(self.held.put_into(weight, scale, self.axis))

    def reserve(self, bias: Tensor, input_scale: Tensor) -> None:
        """Raises `min_scale` until `bias` fits int32 at input_scale * scale, with a bit to spare."""
        needed = affine.scale_for_bias(bias.detach(), input_scale)
        if self.axis is None:
            needed = needed.amax()
        self.min_scale.copy_(torch.maximum(self.min_scale, needed))

    def forward(self, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """(weight on the grid, its scale), or (weight, None) in float."""
        if self.mode != "quantize":
            return weight, None
        scale = self.scale_of(weight)
        if self.config.learned:
            shared = weight.numel() // max(scale.numel(), 1)
            learned = learned_parameter(self.scale, *self._range(), lsq_factor(shared, self.integers))
            if self.held is not None:
                weight = self.held.put_into(weight, learned, self.axis)
            return learned_fake_quantize(weight, learned, self.integers), scale
        if self.held is not None:
            weight = self.held.put_into(weight, scale, self.axis)
        if self.follows:
            return quantize_parameter(weight, scale, -self.qmax, self.qmax, self.axis), scale
        return fake_quantize(weight, scale, torch.zeros_like(scale, dtype=torch.int32), self.integers), scale

    def extra_repr(self) -> str:
        """Its integers and granularity."""
        kind = "learned" if self.config.learned else self.config.observer
        return f"-{self.qmax}..{self.qmax}, {'per-tensor' if self.axis is None else 'per-channel'}, {kind}"


class BiasQuantizer(Quantizer):
    """Rounds a bias to int32 at input scale times weight scale, as every integer kernel needs it."""

    def __init__(self, name: str, owner: ActivationQuantizer) -> None:
        super().__init__(name)
        self._owner = (owner,)  # the input's; in a tuple it is no submodule, which would save its grid twice

    @property
    def switch(self) -> str:
        """The name of the input's quantizer; where the weight is in float it does nothing either."""
        return self._owner[0].name

    def forward(self, bias: Tensor, weight_scale: Tensor | None) -> Tensor:
        """The bias as the runtime will hold it, or as it is in float."""
        if self.mode != "quantize" or weight_scale is None:
            return bias
        return quantize_bias(bias, self._owner[0].scale_now(), weight_scale)
