"""One of the models that a run compares, with all that was made of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from edgeqat.lowering.artifact import Artifact
from edgeqat.lowering.op_time import OpTime
from edgeqat.measuring.measure import Measurement
from edgeqat.measuring.parity import Parity
from edgeqat.program import QuantizedProgram

__all__ = ["Variant"]


@dataclass(eq=False)
class Variant:
    """One of the models a run compares, with all that was made of it; the mappings are by runtime.

    `memory` is the peak memory of a process that runs the artifact, in bytes, None where it cannot be told; `profile`
    is where its time goes.
    """

    name: str
    model: nn.Module
    program: QuantizedProgram
    artifacts: dict[str, Artifact] = field(default_factory=dict)
    parity: dict[str, Parity] = field(default_factory=dict)
    measured: dict[str, Measurement] = field(default_factory=dict)
    memory: dict[str, int | None] = field(default_factory=dict)
    profile: dict[str, tuple[OpTime, ...]] = field(default_factory=dict)
