"""Candidates: the plans that a search chooses among, quantized after training, and what each of them loses."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from edgeqat.diagnose.layers import Layers, layers_of
from edgeqat.diagnose.treatments import BASE, Choice, section_of
from edgeqat.errors import CalibrationWarning, DataError, PlanError
from edgeqat.factory import build_mapping
from edgeqat.graph.capture import capture
from edgeqat.graph.fuse import fuse
from edgeqat.graph.patterns import Fusion
from edgeqat.graph.pixels import Pixels
from edgeqat.graph.replace_blocks import replace_blocks
from edgeqat.intervals import Z_95
from edgeqat.machine import arithmetic_here
from edgeqat.metrics import Metric, Scores, evaluate
from edgeqat.planning import Plan, plan_graph
from edgeqat.ptq.adaround import AdaRoundConfig, adaround
from edgeqat.ptq.correct_bias import correct_biases
from edgeqat.ptq.equalize import equalize
from edgeqat.qconfig_mapping import QConfigMapping
from edgeqat.recipe_quantize import QuantizeSection
from edgeqat.signature import Batch
from edgeqat.simulate.build import simulate
from edgeqat.simulate.model import SimulatedModel
from edgeqat.target_rules import resolve_targets
from edgeqat.train.calibrate import calibrate

__all__ = ["CandidateMaker", "Candidates", "Material", "TrialWork"]

AGREEMENT = "agreement"
EXAMPLE_N = 2


@dataclass(frozen=True, eq=False)
class Material:
    """What trials are made of.

    Attributes:
        model: The float model.
        calibration: Batches of inputs; iterated once a trial.
        batches: (inputs, targets) that trials are judged on, neither trained nor tested on; iterated once a trial.
        base: The settings that a choice changes.
        targets: As `prepare` takes them; trials have the arithmetic of the first, where that is known.
        metric: What is lost is told in its unit.
        pixels: As `prepare` takes it.
        threads: Of a timed call.
        batch: Samples of a timed call.
    """

    model: nn.Module
    calibration: Iterable[Batch]
    batches: Iterable[tuple[Batch, Any]]
    base: QuantizeSection
    targets: Sequence[str]
    metric: Metric
    pixels: Pixels | None = None
    threads: int = 1
    batch: int = 1


class Candidates:
    """The plans of one model by choice.

    Args:
        material: What they are made of.
        fusions: Those that its settings name.
    """

    def __init__(self, material: Material, fusions: Sequence[Fusion]) -> None:
        self.material = material
        base, pixels = material.base, material.pixels
        first = next(iter(material.calibration), None)
        if first is None:
            raise DataError("found no calibration batches, wanted at least one")
        self.example: Batch = pytree.tree_map_only(Tensor, lambda t: t[:EXAMPLE_N], first)
        model, refused = replace_blocks(copy.deepcopy(material.model).eval(), self.example, fusions, pixels)
        self._fused = fuse(capture(model, self.example, base.opaque, False, pixels), fusions, refused)
        planned = plan_graph(self._fused, build_mapping(base), material.targets, base.in_training)
        self._plans: dict[Choice, Plan] = {BASE: planned}
        self._layers = layers_of(simulate(self._fused, planned), material.targets)
        self._float = self.float_simulation()
        self._twin: Scores | None = None
        self.rule = resolve_targets(material.targets)[0]
        self.arithmetic = arithmetic_here(self.rule.name if self.rule.file is None else self.rule.runtime)

    @property
    def layers(self) -> Layers:
        """Those that run in integers by the plan as it is."""
        return self._layers

    def section(self, choice: Choice) -> QuantizeSection:
        """The settings of a choice."""
        return section_of(self.material.base, self._layers, choice)

    def plan(self, choice: Choice) -> Plan:
        """The plan of a choice.

        Raises:
            PlanError: Its settings cannot be satisfied.
        """
        if choice not in self._plans:
            section = self.section(choice)
            self._plans[choice] = plan_graph(
                self._fused, build_mapping(section), self.material.targets, section.in_training
            )
        return self._plans[choice]

    def uncalibrated(self, choice: Choice) -> SimulatedModel:
        """The simulation of a choice's plan.

        Raises:
            PlanError: Its settings cannot be satisfied.
        """
        return simulate(self._fused, self.plan(choice)).eval()

    def simulation(self, choice: Choice) -> SimulatedModel:
        """A choice, quantized after training.

        Raises:
            PlanError: Its settings cannot be satisfied.
        """
        sim = self.uncalibrated(choice)
        aids, calibration = self.section(choice).ptq, self.material.calibration
        if aids.equalize:
            equalize(sim)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CalibrationWarning)  # told by the run that found PTQ to lose too much
            calibrate(sim, calibration)
        twin = copy.deepcopy(sim)
        if aids.adaround is not None:
            adaround(sim, calibration, AdaRoundConfig(**aids.adaround.model_dump()))
        if aids.correct_bias:
            correct_biases(sim, calibration, twin)
        return sim

    def float_simulation(self) -> SimulatedModel:
        """The float model, as one float island that takes what the quantized ones take."""
        everything = QConfigMapping().set_global(None)
        return simulate(self._fused, plan_graph(self._fused, everything, self.material.targets)).eval()

    def measure(self, choice: Choice) -> dict[str, Any]:
        """What a choice loses: the fields of an `Outcome`, JSON-ready."""
        try:
            sim = self.simulation(choice)
        except PlanError as error:
            return {"drop": None, "standard_error": 0.0, "n": 0, "refused": str(error)}
        metric = self.material.metric
        if self._twin is None:
            self._twin = evaluate(self._float.call, self.labelled(), metric)
        exact = contextlib.nullcontext() if self.arithmetic is None else sim.exact(self.arithmetic)
        with exact:
            own = evaluate(sim.call, self.labelled(), metric)
        lost = metric.drop(self._twin.statistics, own.statistics)
        return {"drop": lost.value, "standard_error": (lost.high - lost.low) / (2 * Z_95), "n": lost.n, "refused": ""}

    def labelled(self) -> Iterator[tuple[Batch, Any]]:
        """The batches; for `agreement` the targets are what the float model gives."""
        agreement = self.material.metric.name == AGREEMENT
        for inputs, targets in self.material.batches:
            if agreement:
                with torch.no_grad():  # not around the yield: whoever stops early would be left without gradients
                    targets = self._float.call(inputs)
            yield inputs, targets


@dataclass(frozen=True, eq=False)
class TrialWork:
    """What jobs that make trials share: each process captures and plans the model for itself, once.

    Attributes:
        material: What trials are made of.
        fusions: Those that its settings name, beside the model: what they match are the classes of this very import.
        made: In a process for jobs, its candidates.
    """

    material: Material
    fusions: Sequence[Fusion]
    made: list[Candidates] = field(default_factory=list)

    def __call__(self, choice: Choice) -> dict[str, Any]:
        if not self.made:
            self.made.append(Candidates(self.material, self.fusions))
        return self.made[0].measure(choice)


class CandidateMaker:
    """Makes the simulation of a choice in another process, not calibrated; data is not sent along.

    Args:
        material: What it is made of.
        fusions: Those that its settings name.
        choice: The choice.
    """

    def __init__(self, material: Material, fusions: Sequence[Fusion], choice: Choice) -> None:
        first = [batch for batch, _ in zip(material.calibration, range(1), strict=False)]
        self._material, self._fusions = replace(material, calibration=first, batches=()), fusions
        self._choice = choice

    def __call__(self) -> SimulatedModel:
        return Candidates(self._material, self._fusions).uncalibrated(self._choice)
