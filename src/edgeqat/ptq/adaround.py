"""AdaRound: each weight is rounded up or down so that its layer's outputs, not the weight itself, stay what they were.

Layer by layer, with the inputs that the quantized network so far gives and the outputs of the float one, activation
function included, this minimises over V

    mean |act(W~ x + b) - act(y)|^2 / (the same with W~ rounded to nearest) + strength * mean(1 - |2 h(V) - 1|^beta)
    W~ = scale * clamp(floor(W / scale) + h(V), -qmax, qmax)        h(V) = clamp(1.2 sigmoid(V) - 0.1, 0, 1)

with Adam, while beta falls from 20 to 2 along a half cosine, and the second term, left out at first, drives every h to
0 or 1. The quotient makes one strength do for layers of any scale.

Source: Nagel et al. 2020 (arXiv:2004.10568), sections 3.3 to 3.5.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from edgeqat import affine
from edgeqat.arguments import check_batches, check_made
from edgeqat.errors import PlanError
from edgeqat.op_attrs import ConvAttrs, LinearAttrs
from edgeqat.ptq.patches import Samples, as_matrix, draw
from edgeqat.ptq.snap import Neighbours, snap
from edgeqat.ptq.walk import Layer, check_calibrated, evaluating, float_twin_of, shared_parameters, walk
from edgeqat.signature import Batch
from edgeqat.simulate.model import SimulatedModel

__all__ = ["AdaRound", "AdaRoundConfig", "RoundedLayer", "adaround"]

WARM_UP = 0.2
"""The share of the iterations in which no rounding is pressed for."""

STEEP, FLAT = 20.0, 2.0
"""beta at first, where only what is nearly rounded is drawn further, and at last."""

STRETCH, SHIFT = 1.2, 0.1
"""h is a sigmoid stretched beyond 0 and 1, so that it reaches both."""

PART = 4096
"""Windows whose outputs are computed at once where all are."""

EDGE = 1e-3
"""How near to 0 and 1 h may begin."""


@dataclass(frozen=True)
class AdaRoundConfig:
    """How AdaRound searches.

    Attributes:
        iterations: Steps of Adam a layer.
        positions: Windows of a conv that are looked at in each calibration sample.
        batch_size: Windows a step.
        learning_rate: Adam's.
        strength: Of the term that drives every weight to one of its two integers.
        seed: Of which windows are looked at, and when.
    """

    iterations: int = 1000
    positions: int = 16
    batch_size: int = 256
    learning_rate: float = 0.01
    strength: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("iterations", "positions", "batch_size"):
            if getattr(self, name) < 1:
                raise PlanError(f"AdaRoundConfig: {name} is {getattr(self, name)}, wanted at least 1")
        for name in ("learning_rate", "strength"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise PlanError(f"AdaRoundConfig: {name} is {getattr(self, name)}, wanted a number above 0")
        if self.seed < 0:
            raise PlanError(f"AdaRoundConfig: seed is {self.seed}, wanted at least 0")


@dataclass(frozen=True)
class RoundedLayer:
    """What became of one layer.

    Attributes:
        name: Of its op.
        weight: Of its weight.
        moved: The share of weights that are not on their nearest integer.
        error_nearest: The squared error of the layer's outputs with nearest rounding, as a share of their power.
        error: The same with the integers that it has now; never larger.
    """

    name: str
    weight: str
    moved: float
    error_nearest: float
    error: float


@dataclass(frozen=True)
class AdaRound:
    """What `adaround` did: to each layer, and by op the reason why one was left at nearest rounding."""

    layers: tuple[RoundedLayer, ...]
    skipped: dict[str, str]


def adaround(
    sim: SimulatedModel,
    batches: Iterable[Batch],
    config: AdaRoundConfig | None = None,
    *,
    on_layer: Callable[[RoundedLayer], None] | None = None,
) -> AdaRound:
    """Rounds the weights of a calibrated simulation so that its layers give what they give in float; in place.

    A rounded weight lies on its grid, scale * integer, where `convert`, exact mode and further training find the
    chosen integer by rounding to nearest; its scale stays what it was, to the bit. A layer in which no better rounding
    was found than to nearest is left as it was. The same seed, data and machine give the same integers.

    Args:
        sim: In phase "quantized", with batch norms folded. Weights of 4 bits and less do better from scales that clip
            (`WeightConfig(observer="mse")`).
        batches: Inputs only, as for `calibrate`; some 500 samples do. Their values in the network are held in memory,
            one layer's at a time.
        config: How to search; None for the defaults.
        on_layer: Called after every layer.

    Raises:
        InputError: `sim` was not made by `prepare`, or `batches` is a single one.
        PhaseError: The simulation is not calibrated, or was converted.
        PlanError: A batch norm is live.
        DataError: There is no batch.
    """
    check_made(sim, SimulatedModel)
    check_batches(batches)
    check_calibrated(sim, "adaround")
    config = AdaRoundConfig() if config is None else config
    shared, twin = shared_parameters(sim), float_twin_of(sim, None)
    layers: list[RoundedLayer] = []
    skipped: dict[str, str] = {}
    with evaluating(sim):
        for index, layer in enumerate(walk(sim, twin, batches)):
            attrs = layer.op.attrs
            if layer.parameters.weight in shared:
                skipped[layer.op.name] = f"{shared[layer.parameters.weight]} layers have its weight"
            elif not isinstance(attrs, (ConvAttrs, LinearAttrs)):
                skipped[layer.op.name] = "it is a transposed convolution"
            else:
                seed = Generator().manual_seed(config.seed + index)
                layers.append(_round_layer(sim, layer, attrs, config, seed))
                if on_layer is not None:
                    on_layer(layers[-1])
    return AdaRound(tuple(layers), skipped)


def _round_layer(
    sim: SimulatedModel, layer: Layer, attrs: ConvAttrs | LinearAttrs, config: AdaRoundConfig, generator: Generator
) -> RoundedLayer:
    """Chooses a layer's integers, and puts its weight onto them if they are better than the nearest."""
    name = layer.parameters.weight
    weight, quantizer = sim.get_parameter(name), sim.weight_quantizers()[name]
    scale, grid = quantizer.scale_of(weight), (quantizer.qmax, quantizer.axis, quantizer.follows)
    neighbours = Neighbours(weight, scale, *grid)
    samples = draw(attrs, weight.shape[2:], layer.inputs, layer.targets, config.positions, generator)
    problem = _Problem(attrs, layer.activation, layer.bias(), scale, quantizer.axis, neighbours, samples)
    chosen = problem.solve(config, generator)
    nearest, error = problem.error(neighbours.nearest), problem.error(chosen)
    if error < nearest:
        weight.copy_(snap(weight, chosen, scale, *grid))
    else:
        chosen, error = neighbours.nearest, nearest
    power = float(problem.wanted.double().square().sum())
    moved = float((chosen != neighbours.nearest).float().mean())
    return RoundedLayer(layer.op.name, name, moved, nearest / max(power, 1e-30), error / max(power, 1e-30))


class _Problem:
    """The reconstruction of one layer: the error of its outputs as a function of its integers."""

    def __init__(
        self,
        attrs: ConvAttrs | LinearAttrs,
        activation: str | None,
        bias: Tensor | None,
        scale: Tensor,
        axis: int | None,
        neighbours: Neighbours,
        samples: Samples,
    ) -> None:
        self._attrs, self._activation, self._neighbours, self._samples = attrs, activation, neighbours, samples
        self._step = affine.broadcast(scale, axis, neighbours.below.dim())
        self._bias = 0.0 if bias is None else bias.reshape(samples.targets.shape[1:])
        self.wanted = self._activate(samples.targets)

    def _activate(self, y: Tensor) -> Tensor:
        if self._activation is None:
            return y
        return F.relu(y) if self._activation == "relu" else F.hardtanh(y, 0.0, 6.0)

    def _outputs(self, integers: Tensor, inputs: Tensor) -> Tensor:
        """[P, G, K] -> [P, G, O]."""
        matrix = as_matrix(integers * self._step, self._attrs)
        if len(matrix) == 1:
            product = F.linear(inputs[:, 0], matrix[0])[:, None]
        else:
            product = torch.einsum("pgk,gok->pgo", inputs, matrix)
        return self._activate(product + self._bias)

    def error(self, integers: Tensor) -> float:
        """The sum of squares over all samples."""
        parts = zip(torch.split(self._samples.inputs, PART), torch.split(self.wanted, PART), strict=True)
        return sum(float((self._outputs(integers, x) - y).double().square().sum()) for x, y in parts)

    def solve(self, config: AdaRoundConfig, generator: Generator) -> Tensor:
        """The integers that the search ends with, float32."""
        neighbours, samples = self._neighbours, self._samples
        movable, n = neighbours.movable, len(samples.inputs)
        free = max(int(movable.sum()), 1)
        fixed = neighbours.nearest - neighbours.below
        start = neighbours.fraction.clamp(EDGE, 1 - EDGE)
        v = torch.logit((start + SHIFT) / STRETCH).requires_grad_()
        adam = torch.optim.Adam([v], lr=config.learning_rate)
        unit = max(self.error(neighbours.nearest) / n, 1e-30)
        warm_up = int(WARM_UP * config.iterations)
        with torch.enable_grad():
            for i in range(config.iterations):
                chosen = torch.randint(n, (min(config.batch_size, n),), generator=generator).to(v.device)
                h = torch.where(movable, _rectified_sigmoid(v), fixed)
                found = self._outputs(neighbours.below + h, samples.inputs[chosen])
                loss = (found - self.wanted[chosen]).square().sum() / (len(chosen) * unit)
                if i >= warm_up:
                    beta = _annealed((i - warm_up) / (config.iterations - warm_up))
                    undecided = 1 - (2 * h - 1).abs().pow(beta)
                    loss = loss + config.strength * torch.where(movable, undecided, 0.0).sum() / free
                adam.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                adam.step()
        return neighbours.rounded(_rectified_sigmoid(v.detach()) >= 0.5)


def _rectified_sigmoid(v: Tensor) -> Tensor:
    return (torch.sigmoid(v) * STRETCH - SHIFT).clamp(0.0, 1.0)


def _annealed(done: float) -> float:
    """beta after a share of the iterations."""
    return FLAT + (STEEP - FLAT) * 0.5 * (1.0 + math.cos(math.pi * done))
