"""The quantizers of a simulation: one module for every grid, weight and bias.

Each is in one mode: "float" (does nothing but the activation it stands for), "observe" (the same, and looks),
"quantize". The mode is plain Python, so that no step asks the device for it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgeqat import affine
from edgeqat.errors import EdgeqatError, PhaseError
from edgeqat.program import Grid
from edgeqat.qconfig import ActivationConfig
from edgeqat.simulate.gradients import ClampBounds, quantize_activation, quantize_bias, quantize_parameter
from edgeqat.simulate.observers import Observer, make_observer, observed_range

__all__ = ["ActivationQuantizer", "BiasQuantizer", "Quantizer", "SharedGrid", "WeightQuantizer"]


class Quantizer(nn.Module):
    """What the three have in common: a name and a mode."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.mode = "float"


class ActivationQuantizer(Quantizer):
    """Puts a value on its per-tensor grid; the grid's clamp is the activation function.

    Attributes:
        scale: float32, 0-d; NaN until calibrated.
        zero_point: int32, 0-d.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, name: str, config: ActivationConfig, activation: str | None) -> None:
        super().__init__(name)
        self.qmin, self.qmax = 0, 2**config.bits - 1
        self.config = config
        self.activation = activation
        self.register_buffer("scale", torch.tensor(math.nan))
        self.register_buffer("zero_point", torch.tensor(0, dtype=torch.int32))
        self.observer: Observer | None = None
        self._bounds: ClampBounds | None = None

    @property
    def calibrated(self) -> bool:
        """Whether it has a grid."""
        return bool(torch.isfinite(self.scale))

    def start_observing(self) -> None:
        """Begins calibration with a fresh observer."""
        self.observer = make_observer(self.config.observer, self.qmin, self.qmax)
        self.mode = "observe"

    def settle(self) -> None:
        """Ends calibration: makes the grid from what was observed.

        Raises:
            PhaseError: No data was seen.
        """
        if self.observer is None:
            raise PhaseError(f"{self.name} was not observing; call calibrate")
        low, high = observed_range(self.observer, self.qmin, self.qmax, self.name)
        if self.activation is not None:
            low = 0.0  # the clamp at zero is the ReLU, so the grid starts there
        if self.activation == "relu6":
            high = min(high, 6.0)
        self.set_grid(*affine.activation_qparams(low, high, self.qmin, self.qmax))
        self.observer = None

    def set_grid(self, scale: Tensor, zero_point: Tensor) -> None:
        """Gives it a grid: float32 scale and int32 zero_point, both 0-d."""
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point)
        self._bounds = None

    def bounds(self) -> ClampBounds:
        """Its grid as Python numbers.

        Raises:
            PhaseError: It has none yet.
        """
        if self._bounds is None:
            if not self.calibrated:
                raise PhaseError(f"{self.name} has no grid yet; call calibrate first")
            self._bounds = ClampBounds.of(
                float(self.scale), int(self.zero_point), self.qmin, self.qmax, self.activation is not None
            )
        return self._bounds

    def forward(self, x: Tensor) -> Tensor:
        """x on the grid (mode "quantize"), else x behind the activation function."""
        if self.mode == "quantize":
            return quantize_activation(x, self.bounds())
        x = _activate(x, self.activation)
        if self.mode == "observe" and self.observer is not None:
            self.observer(x.detach())
        return x

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], *args: Any) -> None:
        super()._load_from_state_dict(state_dict, *args)
        self._bounds = None

    def extra_repr(self) -> str:
        """Its grid, or its observer while it has none."""
        grid = f"scale={float(self.scale):.4g}, zero_point={int(self.zero_point)}" if self.calibrated else "no grid"
        activation = f", {self.activation}" if self.activation else ""
        return f"{self.qmin}..{self.qmax}, {grid}, observer={self.config.observer}{activation}"


class SharedGrid(Quantizer):
    """Puts a computed value on the grid of another, such as a pool's output on its input's; it observes nothing."""

    def __init__(self, name: str, owner: ActivationQuantizer) -> None:
        super().__init__(name)
        # In a tuple it is no submodule, which would save its grid twice.
        self._owner = (owner,)

    def forward(self, x: Tensor) -> Tensor:
        """x on the owner's grid (mode "quantize"), else x."""
        return quantize_activation(x, self._owner[0].bounds()) if self.mode == "quantize" else x


def _activate(x: Tensor, activation: str | None) -> Tensor:
    if activation is None:
        return x
    if activation == "relu":
        return F.relu(x)
    if activation == "relu6":
        return F.hardtanh(x, 0.0, 6.0)
    raise EdgeqatError(f"found the activation {activation!r}, wanted relu or relu6")


class WeightQuantizer(Quantizer):
    """Puts a weight on its symmetric grid. The scale follows the weight: its largest magnitude is never clipped.

    Attributes:
        min_scale: float32, [C] or 0-d: what calibration found the scale must not go below, so that biases fit
            int32 even in channels whose weights are (almost) zero.
    """

    min_scale: Tensor

    def __init__(self, name: str, grid: Grid, weight: Tensor) -> None:
        super().__init__(name)
        self.qmax, self.axis = grid.qmax, grid.axis
        shape = () if grid.axis is None else (weight.shape[grid.axis],)
        self.register_buffer("min_scale", torch.full(shape, affine.SCALE_FLOOR))

    def scale_of(self, weight: Tensor) -> Tensor:
        """The scale for the weights as they are: float32, [C] or 0-d."""
        return affine.symmetric_scale(weight, self.qmax, self.axis, self.min_scale)

    def reserve(self, weight: Tensor, bias: Tensor, input_scale: Tensor) -> None:
        """Raises `min_scale` until `bias` fits int32 at input_scale * scale, with a bit to spare."""
        needed = bias.detach().double().abs() / (input_scale.double() * affine.BIAS_LIMIT)
        if self.axis is None:
            needed = needed.amax()
        self.min_scale.copy_(torch.maximum(self.min_scale, needed.to(torch.float32)))

    def forward(self, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """(weight on the grid, its scale), or (weight, None) in float."""
        if self.mode != "quantize":
            return weight, None
        scale = self.scale_of(weight)
        return quantize_parameter(weight, scale, -self.qmax, self.qmax, self.axis), scale

    def extra_repr(self) -> str:
        """Its integers and granularity."""
        return f"-{self.qmax}..{self.qmax}, {'per-tensor' if self.axis is None else 'per-channel'}"


class BiasQuantizer(Quantizer):
    """Rounds a bias to int32 at input scale times weight scale, as every integer kernel needs it."""

    def forward(self, bias: Tensor, input_scale: Tensor, weight_scale: Tensor | None) -> Tensor:
        """The bias as the runtime will hold it, or as it is in float."""
        if self.mode != "quantize" or weight_scale is None:
            return bias
        return quantize_bias(bias, input_scale, weight_scale)
