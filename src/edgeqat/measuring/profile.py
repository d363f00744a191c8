"""Profile: where an artifact's time goes, op by op, as its runtime tells it."""

from __future__ import annotations

import torch

from edgeqat.lowering.artifact import Artifact
from edgeqat.lowering.golden import golden_inputs
from edgeqat.lowering.op_time import OpTime

__all__ = ["profile_ops"]

CALLS = 50


def profile_ops(artifact: Artifact, threads: int = 1, batch: int = 1) -> tuple[OpTime, ...]:
    """Milliseconds a call spends in each kind of op of the graph that really runs, the slowest first.

    Args:
        artifact: An artifact on disk; its golden inputs are what it runs on.
        threads: Threads within an op.
        batch: Samples a call.

    Returns:
        Nothing where the runtime does not tell: a delegate that is one op of its graph.
    """
    inputs = [torch.from_numpy(a) for a in golden_inputs(artifact.folder, artifact.manifest, batch).values()]
    return artifact.session(threads).profile(inputs, CALLS)
