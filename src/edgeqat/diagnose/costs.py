"""What a plan costs on its target: bytes by counting, latency by what each layer in it was measured to change."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from edgeqat.diagnose.cheapest import Cost
from edgeqat.diagnose.layers import Layers
from edgeqat.diagnose.treatments import BASE, OBSERVERS, Choice
from edgeqat.diagnose.trial_log import TrialLog
from edgeqat.errors import PlanError
from edgeqat.lowering.artifact import Artifact
from edgeqat.lowering.lower import lower
from edgeqat.lowering.onnx_writer import WORTH_PACKING
from edgeqat.measuring.latency import measure_latency
from edgeqat.planning import Plan
from edgeqat.signature import Batch
from edgeqat.simulate.freeze import convert
from edgeqat.simulate.model import SimulatedModel
from edgeqat.target_table import Target

__all__ = ["Costs", "weight_bytes"]

FLOAT_BYTES = 4
PACKED_BITS = 4


class Plans(Protocol):
    """What choices become."""

    example: Batch

    @property
    def layers(self) -> Layers:
        """The layers by the plan as it is."""
        ...

    def plan(self, choice: Choice) -> Plan:
        """The plan of a choice."""
        ...

    def simulation(self, choice: Choice) -> SimulatedModel:
        """A choice, quantized after training."""
        ...

    def float_simulation(self) -> SimulatedModel:
        """The float model as one float island."""
        ...


def weight_bytes(plan: Plan, layers: Layers, target: Target) -> int:
    """Bytes that a file for `target` holds of the weights of `layers`. Biases have four an element in any plan."""
    sizes = {name: n for layer in layers.by_name.values() for name, n in layer.weights.items()}
    return sum(
        _stored_bytes(n, plan.weights[name].bits, target) if name in plan.weights else FLOAT_BYTES * n
        for name, n in sizes.items()
    )


def _stored_bytes(n: int, bits: int, target: Target) -> int:
    """Bytes of n quantized weights: one each, or half of one where the file packs them."""
    packed = target.packs_weights and bits <= PACKED_BITS and n >= WORTH_PACKING
    return (n + 1) // 2 if packed else n


class Costs:
    """Costs on one target; files are written to be measured once each, and only where they are asked for.

    Args:
        plans: What choices become.
        target: The target.
        log: Keeps what was measured.
        threads: Of a timed call.
        batch: Samples of a timed call.
    """

    def __init__(self, plans: Plans, target: Target, log: TrialLog, threads: int, batch: int) -> None:
        self._plans, self._target, self._log = plans, target, log
        self._threads, self._batch = threads, batch

    def of(self, choice: Choice, timed: bool) -> Cost:
        """The cost of a choice; of one that was refused, that of the plan as it is.

        Size: that of the plan's own file, and the difference in weights. Latency: that of the plan's own file, and
        the differences that each treatment makes by itself. What several make together may be less: layers in float
        beside each other need no conversion between them.
        """
        sizes = self._log.once("size", self._target.name, self._sizes)
        try:
            plan = self._plans.plan(choice)
        except PlanError:
            return self.of(BASE, timed)
        base, layers = self._plans.plan(BASE), self._plans.layers
        more = weight_bytes(plan, layers, self._target) - weight_bytes(base, layers, self._target)
        file_bytes = sizes["quantized"] + more
        speedup = self._speedup(choice) if timed else None
        return Cost(file_bytes, sizes["float"] / file_bytes, speedup)

    def _sizes(self) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            quantized = self._lowered(self._plans.simulation(BASE), Path(folder) / "quantized")
            twin = self._lowered(self._plans.float_simulation(), Path(folder) / "float")
            return {"quantized": quantized.file_bytes, "float": twin.file_bytes}

    def _speedup(self, choice: Choice) -> float:
        twin = self._log.once("latency", "float", lambda: self._compared(self._plans.float_simulation()))
        total = float(twin["base_ms"])
        for name, treatment in choice.layers:
            if treatment not in OBSERVERS:  # which change no op, but the numbers in it
                found = self._difference(name, treatment)
                total += float(found["ms"]) - float(found["base_ms"])
        return float(twin["ms"]) / total

    def _difference(self, name: str, treatment: str) -> dict[str, Any]:
        one = BASE.treating({name: treatment})
        return self._log.once("latency", [name, treatment], lambda: self._compared(self._plans.simulation(one)))

    def _compared(self, sim: SimulatedModel) -> dict[str, Any]:
        """The median latency of a simulation's file beside that of the plan as it is, call by call in turn."""
        with tempfile.TemporaryDirectory() as folder:
            found = {
                "base_ms": self._lowered(self._plans.simulation(BASE), Path(folder) / "base"),
                "ms": self._lowered(sim, Path(folder) / "other"),
            }
            inputs = {key: self._inputs(artifact) for key, artifact in found.items()}
            timed = measure_latency(found, inputs, self._threads)
            return {key: latency.percentile(50) for key, latency in timed.items()}

    def _lowered(self, sim: SimulatedModel, folder: Path) -> Artifact:
        return lower(convert(sim), self._target.spelled, folder)

    def _inputs(self, artifact: Artifact) -> list[Tensor]:
        def repeated(tensor: Tensor) -> Tensor:
            return tensor[torch.arange(self._batch) % len(tensor)]

        example: Batch = pytree.tree_map_only(Tensor, repeated, self._plans.example)
        return artifact.flat_inputs(example)
