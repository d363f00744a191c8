"""Trials of plans: a model quantized after training by a choice, what that loses, and which layers are to blame."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from edgeqat.data.fingerprint import fingerprint
from edgeqat.diagnose.cheapest import Cost, Outcome
from edgeqat.diagnose.costs import Costs
from edgeqat.diagnose.layers import Layers, layers_of
from edgeqat.diagnose.sensitivity import sensitivity
from edgeqat.diagnose.sensitivity_table import Row, Sensitivity
from edgeqat.diagnose.treatments import (
    BASE,
    FEWER_BITS,
    FEWER_BITS_N,
    Choice,
    global_treatments,
    section_of,
    treatments_of,
)
from edgeqat.diagnose.trial_log import TrialLog
from edgeqat.errors import CalibrationWarning, DataError, PlanError
from edgeqat.factory import build_fusions, build_mapping
from edgeqat.graph.capture import capture
from edgeqat.graph.fuse import fuse
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
from edgeqat.version import __version__

__all__ = ["Material", "PlanTrials"]

AGREEMENT = "agreement"
EXAMPLE_N = 2
RANKED_N = 512
"""Samples that layers are ranked on: with more of them the order changes little, the time much."""


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


class PlanTrials:
    """The problem of a search (`cheapest.Problem`), with a model behind it. Everything measured is logged.

    Args:
        material: What trials are made of.
        log: Where measurements are kept; None keeps none.
        on_table: Called with every table of sensitivities that is made.
    """

    def __init__(
        self, material: Material, log: Path | None = None, on_table: Callable[[Sensitivity], None] | None = None
    ) -> None:
        self.material, self._on_table = material, on_table or (lambda _: None)
        base, pixels = material.base, material.pixels
        first = next(iter(material.calibration), None)
        if first is None:
            raise DataError("found no calibration batches, wanted at least one")
        self.example: Batch = pytree.tree_map_only(Tensor, lambda t: t[:EXAMPLE_N], first)
        fusions = build_fusions(base)
        model, refused = replace_blocks(copy.deepcopy(material.model).eval(), self.example, fusions, pixels)
        self._fused = fuse(capture(model, self.example, base.opaque, False, pixels), fusions, refused)
        planned = plan_graph(self._fused, build_mapping(base), material.targets, base.in_training)
        self._plans: dict[Choice, Plan] = {BASE: planned}
        self._layers = layers_of(simulate(self._fused, planned), material.targets)
        self._float = self.float_simulation()
        self._twin: Scores | None = None
        first_rule = resolve_targets(material.targets)[0]
        self._arithmetic = arithmetic_here(first_rule.name if first_rule.file is None else first_rule.runtime)
        self._log = TrialLog(log, self._identity())
        self._costs = Costs(self, first_rule, self._log, material.threads, material.batch)

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

    def simulation(self, choice: Choice) -> SimulatedModel:
        """A choice, quantized after training.

        Raises:
            PlanError: Its settings cannot be satisfied.
        """
        sim = simulate(self._fused, self.plan(choice)).eval()
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

    def evaluate(self, choice: Choice) -> Outcome:
        """What a choice loses against the float model, sample by sample, in what its first target computes."""
        return Outcome(**self._log.once("trial", _named(choice), lambda: self._measure(choice)))

    def _measure(self, choice: Choice) -> dict[str, Any]:
        try:
            sim = self.simulation(choice)
        except PlanError as error:
            return {"drop": None, "standard_error": 0.0, "n": 0, "refused": str(error)}
        if self._twin is None:
            self._twin = evaluate(self._float.call, self._labelled(), self.material.metric)
        exact = contextlib.nullcontext() if self._arithmetic is None else sim.exact(self._arithmetic)
        with exact:
            own = evaluate(sim.call, self._labelled(), self.material.metric)
        lost = self.material.metric.drop(self._twin.statistics, own.statistics)
        return {"drop": lost.value, "standard_error": (lost.high - lost.low) / (2 * Z_95), "n": lost.n, "refused": ""}

    def possible(self, choice: Choice) -> bool:
        """Whether the settings of a choice can be satisfied."""
        try:
            self.plan(choice)
        except PlanError:
            return False
        return True

    def cost(self, choice: Choice, timed: bool) -> Cost:
        """What a choice costs on the first target."""
        return self._costs.of(choice, timed)

    def globally(self) -> Sequence[Sequence[str]]:
        """Other observers for all layers without settings of their own, and equalization."""
        return global_treatments(self.material.base)

    def treatments(self, layer: str, basis: Choice) -> Sequence[str]:
        """What may be done with a layer, cheapest first."""
        return treatments_of(self.material.base, self._layers, layer, basis.globally)

    def ranking(self, basis: Choice) -> Sequence[tuple[str, ...]]:
        """Groups of layers, each around a weight or a value, by the harm that quantizing it does."""

        def measure() -> dict[str, Any]:
            table = self._table(basis)
            rows = [row for row in table.rows if row.unit.part in ("weight", "output", "value")]
            rows.sort(key=lambda row: -_harm(row, table))
            groups = (
                tuple(dict.fromkeys(name for q in row.unit.quantizers for name in self._layers.around.get(q, ())))
                for row in rows
            )
            return {"groups": [list(group) for group in dict.fromkeys(groups) if group]}

        return [tuple(group) for group in self._log.once("ranking", _named(basis), measure)["groups"]]

    def fewer_bits(self, basis: Choice) -> Sequence[str]:
        """Layers by what fewer bits of their weights alone lose for a byte that they save, least first."""
        saved = self._savings(basis)

        def measure() -> dict[str, Any]:
            table = self._table(basis.treating(dict.fromkeys(saved, FEWER_BITS)))
            lost: dict[str, float] = dict.fromkeys(saved, 0.0)
            for row in (row for row in table.rows if row.unit.part == "weight"):
                for name in {name for q in row.unit.quantizers for name in self._layers.around.get(q, ())} & set(lost):
                    lost[name] += _alone(row)
            return {"layers": sorted(saved, key=lambda name: lost[name] / saved[name])}

        layers: Sequence[str] = self._log.once("fewer bits", _named(basis), measure)["layers"] if saved else []
        return layers

    def _savings(self, basis: Choice) -> dict[str, int]:
        """The bytes that fewer bits would save of each layer for which they do."""
        found: dict[str, int] = {}
        weights = self.plan(basis).weights
        for name, layer in self._layers.by_name.items():
            if any(key in weights and weights[key].bits > FEWER_BITS_N for key in layer.weights):
                fewer = basis.treating({name: FEWER_BITS})
                saved = self.cost(basis, timed=False).file_bytes - self.cost(fewer, timed=False).file_bytes
                if saved > 0:
                    found[name] = saved
        return found

    def _table(self, choice: Choice) -> Sensitivity:
        table = sensitivity(
            self.simulation(choice), self._ranked_on(), self.material.metric, classes=self.material.metric.classes
        )
        self._on_table(table)
        return table

    def _ranked_on(self) -> Iterator[tuple[Batch, Any]]:
        n = 0
        for inputs, targets in self._labelled():
            yield inputs, targets
            n += len(pytree.tree_leaves(inputs)[0])
            if n >= RANKED_N:
                return

    def _labelled(self) -> Iterator[tuple[Batch, Any]]:
        """The batches; for `agreement` the targets are what the float model gives."""
        agreement = self.material.metric.name == AGREEMENT
        for inputs, targets in self.material.batches:
            with torch.no_grad():
                yield inputs, self._float.call(inputs) if agreement else targets

    def _identity(self) -> dict[str, Any]:
        material = self.material
        return {
            "edgeqat": __version__,
            "arithmetic": self._arithmetic,
            "quantize": material.base.model_dump(mode="json"),
            "targets": list(material.targets),
            "metric": material.metric.name,
            "weights": fingerprint(material.model.state_dict()),
            "calibration": [fingerprint(batch) for batch in material.calibration],
            "batches": [fingerprint(batch) for batch in material.batches],
            "timed": [material.threads, material.batch],
        }


def _named(choice: Choice) -> dict[str, Any]:
    """A choice as it stands in the log."""
    return {"globally": list(choice.globally), "layers": dict(choice.layers)}


def _harm(row: Row, table: Sensitivity) -> float:
    """What quantizing a unit costs: the mean of what it costs alone, and on top of all others.

    One figure would not do: on top of a layer that ruins the outputs nothing seems to matter, and alone a unit does
    not show how errors add up.
    """
    return (_alone(row) + _lost(table.quantized) - _lost(row.without)) / 2


def _alone(row: Row) -> float:
    return _lost(row.only)


def _lost(effect: Any) -> float:
    """The divergence of the classes' probabilities; where there are none, the noise's share of the outputs' energy."""
    return float(effect.kl.value) if effect.kl is not None else float(10 ** (-effect.sqnr.value / 10))
