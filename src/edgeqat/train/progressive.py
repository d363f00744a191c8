"""Progressive training: at 8 bits first, then at fewer, each stage from the weights of the one before."""

from __future__ import annotations

from edgeqat.errors import ModelError
from edgeqat.simulate.model import SimulatedModel
from edgeqat.simulate.phases import FLOAT
from edgeqat.train.checkpoint import put_weights

__all__ = ["carry_weights"]

QUANTIZERS = "quantizers."


def carry_weights(source: SimulatedModel, target: SimulatedModel) -> SimulatedModel:
    """Gives a simulation the trained weights of another of the same model, at other bits: copied, to the bit.

    Ranges and learned scales are left behind, for other bits want others: calibrate the target next.

        wide = eq.calibrate(eq.prepare(model, x, qconfig_mapping=mapping.at_least(weights=8)), batches)
        eq.fit(wide, ...)
        sim = eq.calibrate(eq.carry_weights(wide, eq.prepare(model, x, qconfig_mapping=mapping)), batches)
        eq.fit(sim, ...)

    Args:
        source: In any phase; left as it is.
        target: Prepared from the same model, for the same batch-norm mode; not converted.

    Returns:
        `target`, in phase "float".

    Raises:
        ModelError: They are of different models, or one has live batch norms and the other folded ones.
        PhaseError: The target was converted.
    """
    given = {name: t for name, t in source.state_dict().items() if not name.startswith(QUANTIZERS)}
    own = [name for name in target.state_dict() if not name.startswith(QUANTIZERS)]
    different = sorted(given.keys() ^ set(own))
    if different:
        raise ModelError(
            f"the two simulations are not of one model: {different[0]} is in one of them alone; prepare both from the "
            "same model, with the same batch_norm"
        )
    target.set_phase(FLOAT)
    put_weights(target, target.state_dict() | given, "the simulation's weights")
    return target
