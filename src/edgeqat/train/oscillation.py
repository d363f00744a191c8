"""Weights whose integers go back and forth between two neighbours: how many do, and what may be done about them.

At few bits a weight near the middle between two points of its grid changes its integer step after step: the
straight-through gradient pushes it to the far side whichever side it is on. Of each weight, after each step,

    o = 1 where its integer changed in the direction opposite to its last change, else 0
    frequency <- frequency + momentum * (o - frequency)
    average   <- average + momentum * (integer - average)

Freezing: where frequency > threshold, the integer becomes round(average) and stays. Dampening adds to the loss

    factor * sum over weights (w^ - clip(w))**2 / n        n weights a kernel, w^ the nearest point, without gradient

which pulls each weight to the middle of its bin. Source: Nagel et al. 2022 (arXiv:2203.11086), sections 3.1, 4.1, 4.2.

A frozen weight is an integer, so its real value moves with the scale: a learned scale takes its gradient as that of
integer * scale. Where the scale is the largest weight's ("minmax"), the largest weight of each channel, and what would
be frozen at the largest integer, stay free: held there, the scale could only grow.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edgeqat import affine
from edgeqat.errors import CheckpointError, InputError, PhaseError
from edgeqat.simulate.model import SimulatedModel
from edgeqat.simulate.parameter_quantizers import HeldIntegers, WeightQuantizer
from edgeqat.simulate.phases import QUANTIZED

__all__ = ["Annealed", "Oscillating", "Oscillation", "Track", "Tracker", "dampening_loss"]

OSCILLATES_ABOVE = 0.005
"""The frequency above which a weight counts as oscillating, as in the paper's figures: once in 200 steps."""

SHAPES = ("cosine", "linear")


@dataclass(frozen=True)
class Annealed:
    """A number that changes in training; before it begins, what it is for is not done.

    Attributes:
        first: Where it begins.
        last: Where it ends.
        begin: The share of all steps after which it begins, 0 to below 1.
        shape: "cosine" or "linear".
    """

    first: float
    last: float
    begin: float = 0.25
    shape: str = "cosine"

    def __post_init__(self) -> None:
        if not (0.0 <= self.first < math.inf and 0.0 <= self.last < math.inf):
            raise InputError(
                f"found an annealed number from {self.first} to {self.last}, wanted finite ones from 0 up"
            )
        if not 0.0 <= self.begin < 1.0:
            raise InputError(f"found begin {self.begin}, wanted 0 to below 1")
        if self.shape not in SHAPES:
            raise InputError(f"found the shape {self.shape!r}, wanted one of {', '.join(SHAPES)}")

    def at(self, progress: float) -> float | None:
        """The number after this share of all steps; None before it begins."""
        if progress < self.begin:
            return None
        done = (progress - self.begin) / (1.0 - self.begin)
        if self.shape == "cosine":
            done = 0.5 * (1.0 - math.cos(math.pi * done))
        return self.first + (self.last - self.first) * done


@dataclass(frozen=True)
class Oscillation:
    """Which weights are watched, and what is done; by default nothing but counting.

    Attributes:
        momentum: Of the two running means, above 0 to below 1; a threshold wants to be 2 to 3 times that, or more.
        max_bits: Weights of so many bits or fewer are watched.
        freeze: The threshold of the frequency; None freezes nothing. The paper's: 0.1 to 0.01.
        dampen: The factor of the added loss; None adds none. The paper's: 0 to 0.1.
    """

    momentum: float = 0.01
    max_bits: int = 4
    freeze: Annealed | None = None
    dampen: Annealed | None = None

    def __post_init__(self) -> None:
        if not 0.0 < self.momentum < 1.0:
            raise InputError(f"found the oscillation momentum {self.momentum}, wanted above 0 to below 1")
        if not 2 <= self.max_bits <= 8:
            raise InputError(f"found max_bits {self.max_bits}, wanted 2 to 8")


@dataclass(frozen=True)
class Oscillating:
    """How many weights of one parameter oscillate.

    Attributes:
        weight: Its dotted name.
        bits: Width of its integers.
        n: How many weights it has.
        oscillating: How many changed back more often than once in 200 steps, frozen ones left out.
        frozen: How many are frozen.
    """

    weight: str
    bits: int
    n: int
    oscillating: int
    frozen: int


class Track:
    """What is known of the integers of one weight tensor; see the head of this file.

    Attributes:
        integers: int8, those after the last step.
        direction: int8, -1 or 1 as they last changed, 0 where they never did.
        frequency: float32, of oscillation.
        average: float32, of the integers.
        frozen: bool.
    """

    def __init__(self, integers: Tensor) -> None:
        self.integers = integers.clone()
        self.direction = torch.zeros_like(integers)
        self.frequency = torch.zeros_like(integers, dtype=torch.float32)
        self.average = integers.float()
        self.frozen = torch.zeros_like(integers, dtype=torch.bool)

    def update(self, integers: Tensor, momentum: float) -> None:
        """Takes in the integers after a step, int8."""
        change = (integers > self.integers).to(torch.int8) - (integers < self.integers).to(torch.int8)
        oscillated = change * self.direction < 0
        self.frequency.lerp_(oscillated.float(), momentum)
        self.average.lerp_(integers.float(), momentum)
        self.direction.copy_(torch.where(change == 0, self.direction, change))
        self.integers.copy_(integers)

    def freeze(self, threshold: float, allowed: Tensor) -> None:
        """Freezes what oscillates more often than `threshold`, where it is allowed (bool), at `destination`."""
        new = (self.frequency > threshold) & allowed & ~self.frozen
        self.integers.copy_(torch.where(new, self.destination(), self.integers))
        self.frozen |= new

    def destination(self) -> Tensor:
        """The integers that weights are nearest to on average, int8; half to even."""
        return self.average.round().to(torch.int8)

    def tensors(self) -> dict[str, Tensor]:
        """All of it by name, not copied."""
        return {
            "integers": self.integers,
            "direction": self.direction,
            "frequency": self.frequency,
            "average": self.average,
            "frozen": self.frozen,
        }


class Tracker:
    """Watches the weights of a simulation in training.

    Raises:
        InputError: The model is no simulation.
        PhaseError: It is not calibrated.
    """

    def __init__(self, settings: Oscillation, model: nn.Module) -> None:
        if not isinstance(model, SimulatedModel):
            raise InputError(f"found a {type(model).__name__} whose oscillation to watch, wanted a simulation")
        if model.phase != QUANTIZED:
            raise PhaseError(f"oscillation is watched in phase quantized, found {model.phase}; calibrate first")
        self._settings = settings
        self._weights: dict[str, tuple[nn.Parameter, WeightQuantizer, Track]] = {}
        for name, quantizer in model.weight_quantizers().items():
            weight = model.get_parameter(name)
            if quantizer.config.bits <= settings.max_bits and weight.requires_grad:
                self._weights[name] = (weight, quantizer, Track(quantizer.integers_of(weight)))

    def loss(self, progress: float) -> Tensor | None:
        """What dampening adds to the loss, 0-d; None for nothing."""
        factor = None if self._settings.dampen is None else self._settings.dampen.at(progress)
        if factor is None or not self._weights:
            return None
        losses = [dampening_loss(weight, quantizer) for weight, quantizer, _ in self._weights.values()]
        return factor * torch.stack(losses).sum()

    def after_step(self, progress: float) -> None:
        """Looks at the integers after a step, and freezes."""
        threshold = None if self._settings.freeze is None else self._settings.freeze.at(progress)
        for weight, quantizer, track in self._weights.values():
            quantizer.settle_held(weight)
            track.update(quantizer.integers_of(weight), self._settings.momentum)
            if threshold is not None:
                track.freeze(threshold, _may_freeze(weight, quantizer, track))
                quantizer.held = HeldIntegers(track.frozen, track.integers)
                quantizer.settle_held(weight)

    def settle(self) -> None:
        """Keeps frozen integers where scales have moved between steps."""
        for weight, quantizer, _ in self._weights.values():
            quantizer.settle_held(weight)

    def release(self) -> None:
        """Ends it: weights stay on their integers, and nothing holds them there any more."""
        for _, quantizer, _ in self._weights.values():
            quantizer.held = None

    def counts(self) -> tuple[Oscillating, ...]:
        """How many weights oscillate, by parameter."""
        found = []
        for name, (_, quantizer, track) in self._weights.items():
            oscillating = int(((track.frequency > OSCILLATES_ABOVE) & ~track.frozen).sum())
            bits, n = quantizer.config.bits, track.frozen.numel()
            found.append(Oscillating(name, bits, n, oscillating, int(track.frozen.sum())))
        return tuple(found)

    def state(self) -> dict[str, Tensor]:
        """What it knows, as "parameter/what", not copied."""
        return {
            f"{name}/{what}": tensor
            for name, (_, _, track) in self._weights.items()
            for what, tensor in track.tensors().items()
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Takes what was known from a training state; its frozen weights are held again.

        Raises:
            CheckpointError: It is not this model's.
        """
        own = self.state()
        if state.keys() != own.keys() or any(state[key].shape != tensor.shape for key, tensor in own.items()):
            raise CheckpointError("the training state's oscillating weights do not fit the model; start afresh")
        for key, tensor in own.items():
            tensor.copy_(state[key])
        for _, quantizer, track in self._weights.values():
            quantizer.held = HeldIntegers(track.frozen, track.integers)


def dampening_loss(weight: Tensor, quantizer: WeightQuantizer) -> Tensor:
    """Squared distance of weights, clipped to the grid, from their points: the mean of a kernel, added up; 0-d."""
    with torch.no_grad():
        scale = affine.broadcast(quantizer.scale_of(weight), quantizer.axis, weight.dim())
        point, bound = quantizer.integers_of(weight) * scale, quantizer.qmax * scale
    clipped = torch.clamp(weight, -bound, bound)
    kernels = weight.shape[0 if quantizer.axis is None else quantizer.axis]
    return (point - clipped).square().sum() * (kernels / weight.numel())


def _may_freeze(weight: Tensor, quantizer: WeightQuantizer, track: Track) -> Tensor:
    """Which weights may be frozen, bool: all, but for those that a scale follows."""
    if not quantizer.follows:
        return torch.ones_like(track.frozen)
    size = weight.detach().abs()
    dims = [d for d in range(weight.dim()) if d != quantizer.axis]
    largest = size.amax(dim=dims, keepdim=True) if dims else size
    return (size < largest) & (track.destination().abs() < quantizer.qmax)
