"""How the values and weights of a simulation are distributed over their grids: what a report draws.

The float values of one batch, layer by layer, and how far the same values are off where everything is quantized.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from edgeqat.diagnose.ranges import Ranges, RangeTally, decibels, weight_ranges
from edgeqat.diagnose.switches import evaluating, quantizing, switchable, watching
from edgeqat.program import QuantizedProgram
from edgeqat.signature import Batch
from edgeqat.simulate.fake_quant import ActivationQuantizer
from edgeqat.simulate.model import SimulatedModel

__all__ = ["BINS", "Distribution", "distributions", "samples_within"]

BINS = 64

LARGEST = 8_000_000
"""Elements of all values of a batch, at most: 32 MB of float32."""


@dataclass(frozen=True)
class Distribution:
    """A value or a weight over its grid.

    Attributes:
        name: Of the value, or of the parameter.
        part: "activation" or "weight".
        ranges: Where its float numbers lie, and where its grid does.
        counts: How many of its float numbers fall into each of `BINS` equal bins from `ranges.low` to `ranges.high`;
            empty where these are equal.
        sqnr_db: Of a value: energy by the energy of the error that it has where everything is quantized, in dB, so
            with what it inherits; of a weight, its own. None where there is no error.
    """

    name: str
    part: Literal["activation", "weight"]
    ranges: Ranges
    counts: tuple[int, ...]
    sqnr_db: float | None


def samples_within(program: QuantizedProgram, largest: int = LARGEST) -> int:
    """How many samples have no more than so many elements in all values together; one at least, 64 at most."""
    sizes = [
        math.prod(size for size in value.shape if isinstance(size, int))
        for value in program.values.values()
        if value.grid is not None
    ]
    return max(1, min(64, largest // max(1, sum(sizes))))


def distributions(sim: SimulatedModel, batch: Batch) -> tuple[Distribution, ...]:
    """Of each value that has a grid of its own, then of each weight, in the order of the network.

    Args:
        sim: Calibrated; left as it was.
        batch: Inputs; all values of the batch are held in memory twice (see `samples_within`).

    Raises:
        PhaseError: The simulation is not calibrated.
    """
    quantizers = sim.activation_quantizers()
    with evaluating(sim):
        with quantizing(sim, ()):
            values = _run(sim, batch)
        with quantizing(sim, switchable(sim)):
            found = _run(sim, batch)
        activations = [
            _of_value(name, quantizers[name], value, found[name]) for name, value in values.items() if value.numel()
        ]
        weights = [
            _of_weight(name, weight_ranges(quantizer, sim.get_parameter(name)), sim.get_parameter(name))
            for name, quantizer in sim.weight_quantizers().items()
        ]
    return tuple(one for one in (*activations, *weights) if one is not None)


def _run(sim: SimulatedModel, batch: Batch) -> dict[str, Tensor]:
    """What each quantizer gives in one run; the first time, where it is called several times."""
    seen: dict[str, Tensor] = {}

    def look(name: str, output: Tensor) -> None:
        seen.setdefault(name, output.detach().float())

    with watching(sim, sim.activation_quantizers(), look):
        sim.call(batch)
    return seen


def _of_value(name: str, quantizer: ActivationQuantizer, value: Tensor, found: Tensor) -> Distribution | None:
    tally = RangeTally(quantizer)
    tally.add(value)
    ranges = tally.ranges()
    if ranges is None:
        return None
    energy, error = (float(t.double().square().sum()) for t in (value, found - value))
    return Distribution(name, "activation", ranges, _counts(value, ranges), _finite(decibels(energy, error)))


def _of_weight(name: str, ranges: Ranges, weight: Tensor) -> Distribution:
    return Distribution(name, "weight", ranges, _counts(weight.detach().float(), ranges), _finite(ranges.sqnr))


def _counts(x: Tensor, ranges: Ranges) -> tuple[int, ...]:
    if not ranges.low < ranges.high:
        return ()
    finite = x[x.isfinite()].double()  # float32 bins would not reach the ends of a range that float32 rounds
    return tuple(int(n) for n in torch.histc(finite, BINS, ranges.low, ranges.high))


def _finite(sqnr: float) -> float | None:
    return sqnr if math.isfinite(sqnr) else None
