"""Convert: a trained simulation becomes a quantized program."""

from __future__ import annotations

from edgeqat.program import QuantizedProgram
from edgeqat.simulate.freeze import freeze
from edgeqat.simulate.model import SimulatedModel

__all__ = ["convert"]


def convert(sim: SimulatedModel) -> QuantizedProgram:
    """The quantized program of a calibrated simulation; the simulation is left as it was.

    Raises:
        PhaseError: It was not calibrated.
        PlanError: Its weights or biases fit no integers.
    """
    return freeze(sim)
