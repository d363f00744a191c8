"""The phases of a simulation, and which may follow which.

    float --------> calibrating <----.
      ^  \\_________      |           |
      |            v     v           |
      '--------- quantized ----------'
                     ^  |
                     |  v
                   converted

In "calibrating" the model runs in float and its observers look. In "quantized" every value is on its grid. In
"converted" it computes the same, and its grids are those of a program that was handed out, so calibration is closed.
"""

from __future__ import annotations

from collections.abc import Mapping

from edgeqat.errors import PhaseError

__all__ = ["CALIBRATING", "CONVERTED", "FLOAT", "PHASES", "QUANTIZED", "check_move"]

FLOAT, CALIBRATING, QUANTIZED, CONVERTED = "float", "calibrating", "quantized", "converted"

PHASES = (FLOAT, CALIBRATING, QUANTIZED, CONVERTED)

_REFUSED: Mapping[tuple[str, str], str] = {
    (CONVERTED, CALIBRATING): (
        "its grids are those of the program that convert returned, and calibrating would change them; prepare the "
        "model again, or reopen this simulation with set_phase('quantized')"
    ),
    (CONVERTED, FLOAT): "it was converted; reopen it with set_phase('quantized') first",
    (CALIBRATING, CONVERTED): "it is calibrating; let edgeqat.calibrate(sim, batches) finish before convert",
    (FLOAT, CONVERTED): "it is in float; switch quantization on with set_phase('quantized') before convert",
}


def check_move(current: str, wanted: str) -> None:
    """Checks that a simulation may go from one phase to another.

    Raises:
        PhaseError: There is no such phase, or no such way.
    """
    if wanted not in PHASES:
        raise PhaseError(f"found the phase {wanted!r}, wanted one of {', '.join(PHASES)}")
    why = _REFUSED.get((current, wanted))
    if why is not None:
        raise PhaseError(f"the simulation cannot go from {current} to {wanted}: {why}")
