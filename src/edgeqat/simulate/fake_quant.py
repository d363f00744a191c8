"""The quantizers of a simulation's values: one module for every grid.

Each is in one mode: "float" (does nothing but the activation it stands for), "observe" (the same, and looks),
"quantize". The mode is plain Python, so that no step asks the device for it.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgeqat import affine
from edgeqat.errors import EdgeqatError, PhaseError
from edgeqat.grid_rules import GridRules
from edgeqat.qconfig import ActivationConfig
from edgeqat.simulate.gradients import (
    ClampBounds,
    Integers,
    learned_fake_quantize,
    learned_parameter,
    lsq_factor,
    offset_zero_point,
    quantize_activation,
)
from edgeqat.simulate.observers import Observer, make_observer, observed_range

__all__ = ["FREEDOM", "ActivationQuantizer", "Quantizer", "SharedGrid"]

RELU6_TOP = 6.0

NO_RULES = GridRules()

FREEDOM = 8.0
"""A learned scale stays within this factor of the calibrated one. Training that wants to go further has diverged; a
grid that followed it would end at a scale of nothing, on which no bias fits int32."""


class Quantizer(nn.Module):
    """What all quantizers have in common: a name and a mode."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.mode = "float"

    @property
    def switch(self) -> str:
        """The name of the quantizer that it is switched on and off with: its own, or the one whose grid it takes."""
        return self.name


class ActivationQuantizer(Quantizer):
    """Puts a value on its per-tensor grid; the grid's clamp is the activation function.

    Attributes:
        scale: float32, 0-d, NaN until calibrated; a parameter where the range is learned, else a buffer.
        zero_point: int32 buffer, 0-d, where the range is frozen.
        offset: float32 parameter, 0-d, the real value of integer 0, where the range is learned and neither symmetry
            nor an activation function fixes its lower end.
        middle: The zero point of a symmetric grid; 0 on others.
        lowest: The smallest integer that values are clamped to: qmin; the middle of a symmetric grid behind a ReLU,
            which is where the ReLU then clamps.
        limits: float32 buffer, [2]: smallest and largest scale, where the range is learned.
        fixed: (scale, zero_point) of a grid that the function before it fixes, such as a sigmoid's; None where
            calibration finds it.
        constant: Whether it is the grid of a parameter or buffer, which may well be one number.
        saves_bytes: Whether a frozen grid saves a byte an element for backward rather than its input. Behind a batch
            norm, which saves its own input, the quantizer's input would be a third tensor where float training has
            two.
    """

    scale: Tensor
    offset: nn.Parameter | None
    limits: Tensor
    _anywhere: Tensor

    def __init__(
        self,
        name: str,
        config: ActivationConfig,
        activation: str | None = None,
        fixed: tuple[Tensor, Tensor] | None = None,
        constant: bool = False,
        saves_bytes: bool = False,
        rules: GridRules = NO_RULES,
    ) -> None:
        super().__init__(name)
        self.saves_bytes, self.fixed, self.constant = saves_bytes, fixed, constant
        self.qmin, self.qmax = 0, 2**config.bits - 1
        self.config = config
        self.activation = activation
        # Behind a ReLU half the grid lies idle, so it is symmetric only where a target insists.
        self.symmetric = config.symmetric and (activation is None or bool(rules.centred))
        self.power_of_two = bool(rules.power_of_two_activations)
        self.middle = (self.qmin + self.qmax + 1) // 2 if self.symmetric else 0
        self.lowest = self.middle if activation is not None else self.qmin
        if config.learned:
            self.scale = nn.Parameter(torch.tensor(math.nan))
            anchored = activation is not None or self.symmetric
            self.register_parameter("offset", None if anchored else nn.Parameter(torch.tensor(math.nan)))
            self.register_buffer("limits", torch.tensor([math.nan, math.nan]))
            self.register_buffer("_anywhere", torch.tensor([-math.inf, math.inf]), persistent=False)
        else:
            self.register_buffer("scale", torch.tensor(math.nan))
            self.register_buffer("zero_point", torch.tensor(0, dtype=torch.int32))
        self.observer: Observer | None = None
        self._bounds: ClampBounds | None = None

    @property
    def calibrated(self) -> bool:
        """Whether it has a grid."""
        return bool(torch.isfinite(self.scale.detach()))

    @property
    def highest(self) -> int:
        """The largest integer that values are clamped to: qmax, or where 6 is behind a ReLU6.

        Only a scale that is a power of two leaves room above 6.
        """
        top: int = self.qmax
        if not self.power_of_two or self.activation != "relu6":
            return top
        scale, zero_point = self.grid()
        return min(top, int(zero_point) + round(RELU6_TOP / float(scale)))

    def start_observing(self) -> None:
        """Begins calibration with a fresh observer; a fixed grid needs none, but must see that data came."""
        config = self.config
        self.observer = make_observer(
            config.observer, self.qmin, self.qmax, self.name, arguments=config.arguments, symmetric=self.symmetric
        )
        self.mode = "observe"

    def settle(self) -> None:
        """Ends calibration: makes the grid from what was observed.

        Raises:
            PhaseError: No data was seen.
        """
        if self.observer is None:
            raise PhaseError(f"{self.name} was not observing; call calibrate")
        if self.fixed is not None:
            self.observer = None
            self.set_grid(*self.fixed)
            return
        low, high = observed_range(self.observer, self.qmin, self.qmax, self.name, warn=not self.constant)
        if self.activation is not None:
            low = 0.0  # the clamp at zero is the ReLU, so the grid starts there
        if self.activation == "relu6":
            high = min(high, RELU6_TOP)
        self.set_grid(
            *affine.activation_qparams(
                low, high, self.qmin, self.qmax, symmetric=self.symmetric, power_of_two=self.power_of_two
            )
        )
        self.observer = None

    def set_grid(self, scale: Tensor, zero_point: Tensor) -> None:
        """Gives it a grid: float32 scale and int32 zero_point, both 0-d."""
        with torch.no_grad():
            self.scale.copy_(scale)
            if not self.config.learned:
                self.get_buffer("zero_point").copy_(zero_point)
            else:
                self.limits.copy_(torch.stack([scale / FREEDOM, scale * FREEDOM]))
                if self.activation == "relu6":  # the top of its grid is the clamp at 6
                    top = affine.activation_qparams(0.0, RELU6_TOP, self.qmin, self.qmax, symmetric=self.symmetric)
                    self.limits[1].clamp_(max=top[0])
                if self.offset is not None:
                    self.offset.copy_(-zero_point * scale)
        self.read_grid()

    def scale_now(self) -> Tensor:
        """The scale in use: float32, 0-d, without gradient."""
        return self.scale.detach().clamp(self.limits[0], self.limits[1]) if self.config.learned else self.scale

    def grid(self) -> tuple[Tensor, Tensor]:
        """(scale, zero_point) in use: float32 and int32, 0-d, without gradient."""
        scale = self.scale_now()
        if not self.config.learned:
            return scale, self.get_buffer("zero_point")
        with torch.no_grad():
            return scale, offset_zero_point(scale, self.offset, self._learned_integers()) + self.middle

    def _learned_integers(self) -> Integers:
        """Those that the gradients count in: a symmetric grid's are signed, around its zero point."""
        return Integers(self.lowest - self.middle, self.qmax - self.middle)

    def read_grid(self) -> None:
        """Keeps a frozen grid as Python numbers, from where `bounds` takes it."""
        self._bounds = None
        if self.calibrated and not self.config.learned:
            scale, zero_point = self.grid()
            rectified = self.activation is not None
            self._bounds = ClampBounds.of(float(scale), int(zero_point), self.lowest, self.highest, rectified)

    def bounds(self) -> ClampBounds:
        """A frozen grid as Python numbers.

        Raises:
            PhaseError: It has none yet.
        """
        if self._bounds is None:
            raise PhaseError(f"{self.name} has no grid yet; call calibrate first")
        return self._bounds

    def quantize(self, x: Tensor) -> Tensor:
        """x on the grid, in x's dtype."""
        if not self.config.learned:
            return quantize_activation(x, self.bounds(), self.saves_bytes)
        integers = self._learned_integers()
        factor = lsq_factor(max(x[0].numel(), 1), integers)
        scale = learned_parameter(self.scale, self.limits[0], self.limits[1], factor)
        if self.offset is None:
            return learned_fake_quantize(x, scale, integers)
        offset = learned_parameter(self.offset, self._anywhere[0], self._anywhere[1], factor)
        return learned_fake_quantize(x, scale, integers, offset)

    def forward(self, x: Tensor) -> Tensor:
        """x on the grid (mode "quantize"), else x behind the activation function."""
        if self.mode == "quantize":
            return self.quantize(x)
        x = _activate(x, self.activation)
        if self.mode == "observe" and self.observer is not None:
            self.observer(x.detach())
        return x

    def extra_repr(self) -> str:
        """Its grid, or its observer while it has none."""
        scale, zero_point = self.grid()
        shift = 2 ** (self.config.bits - 1) if self.config.signed else 0
        grid = f"scale={float(scale):.4g}, zero_point={int(zero_point) - shift}" if self.calibrated else "no grid"
        kind = ", learned" if self.config.learned else ""
        activation = f", {self.activation}" if self.activation else ""
        integers = f"{self.qmin - shift}..{self.qmax - shift}"
        return f"{integers}, {grid}{kind}, observer={self.config.describe()}{activation}"


class SharedGrid(Quantizer):
    """Puts a computed value on the grid of another, such as a pool's output on its input's; it observes nothing."""

    def __init__(self, name: str, owner: ActivationQuantizer) -> None:
        super().__init__(name)
        # In a tuple it is no submodule, which would save its grid twice.
        self._owner = (owner,)

    @property
    def switch(self) -> str:
        """The name of the owner of its grid."""
        return self._owner[0].name

    def forward(self, x: Tensor) -> Tensor:
        """x on the owner's grid (mode "quantize"), else x."""
        return self._owner[0].quantize(x) if self.mode == "quantize" else x


def _activate(x: Tensor, activation: str | None) -> Tensor:
    if activation is None:
        return x
    if activation == "relu":
        return F.relu(x)
    if activation == "relu6":
        return F.hardtanh(x, 0.0, RELU6_TOP)
    raise EdgeqatError(f"found the activation {activation!r}, wanted relu or relu6")
