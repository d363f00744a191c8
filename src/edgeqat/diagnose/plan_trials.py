"""Trials of plans: what each choice loses, what it costs, and which layers are to blame; measured once, and logged."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import cached_property
from pathlib import Path
from typing import Any

from torch.utils import _pytree as pytree

from edgeqat.data.fingerprint import fingerprint
from edgeqat.diagnose.candidates import CandidateMaker, Candidates, Material, TrialWork
from edgeqat.diagnose.cheapest import Cost, Outcome
from edgeqat.diagnose.costs import Costs
from edgeqat.diagnose.jobs import Failed, Jobs, Sent
from edgeqat.diagnose.layers import Layers
from edgeqat.diagnose.sensitivity import sensitivity
from edgeqat.diagnose.sensitivity_table import Row, Sensitivity
from edgeqat.diagnose.treatments import (
    BASE,
    FEWER_BITS,
    FEWER_BITS_N,
    Choice,
    global_treatments,
    treatments_of,
)
from edgeqat.diagnose.trial_log import TrialLog
from edgeqat.errors import PlanError
from edgeqat.factory import build_fusions
from edgeqat.recipe_quantize import QuantizeSection
from edgeqat.signature import Batch
from edgeqat.version import __version__

__all__ = ["Material", "PlanTrials"]

RANKED_N = 512
"""Samples that layers are ranked on: with more of them the order changes little, the time much."""


class PlanTrials:
    """The problem of a search (`cheapest.Problem`), with a model behind it. Everything measured is logged.

    Args:
        material: What trials are made of.
        log: Where measurements are kept; None keeps none.
        on_table: Called with every table of sensitivities that is made.
        jobs: Processes that trials are made in, all of them; None for this one.
    """

    def __init__(
        self,
        material: Material,
        log: Path | None = None,
        on_table: Callable[[Sensitivity], None] | None = None,
        jobs: Jobs | None = None,
    ) -> None:
        self.material, self._on_table = material, on_table or (lambda _: None)
        self._fusions = build_fusions(material.base)
        self.candidates = Candidates(material, self._fusions)
        self._jobs = Jobs() if jobs is None else jobs
        self._log = TrialLog(log, self._identity())
        self._costs = Costs(self.candidates, self.candidates.rule, self._log, material.threads, material.batch)

    @property
    def at_once(self) -> int:
        """How many trials are made at a time."""
        return self._jobs.n

    @property
    def layers(self) -> Layers:
        """Those that run in integers by the plan as it is."""
        return self.candidates.layers

    def section(self, choice: Choice) -> QuantizeSection:
        """The settings of a choice."""
        return self.candidates.section(choice)

    def evaluate(self, choice: Choice) -> Outcome:
        """What a choice loses against the float model, sample by sample, in what its first target computes."""
        if self._jobs.n > 1:
            self.evaluate_all([choice])  # where that fails, the trial is made here, and tells what is wrong
        return Outcome(**self._log.once("trial", _named(choice), lambda: self.candidates.measure(choice)))

    def evaluate_all(self, choices: Sequence[Choice]) -> None:
        """Makes trials in jobs, and logs each as it ends. One that fails is left out: perhaps it is never asked for.

        Raises:
            JobError: The system ended a job.
        """
        missing = [choice for choice in choices if self._log.known("trial", _named(choice)) is None]
        if not missing:
            return
        with closing(self._jobs.run(self._sent, missing)) as ended:
            for at, found in ended:
                if not isinstance(found, Failed):
                    self._log.keep([("trial", _named(missing[at]), found)])

    @cached_property
    def _sent(self) -> Sent:
        return self._jobs.send(TrialWork(self.material, self._fusions))

    def possible(self, choice: Choice) -> bool:
        """Whether the settings of a choice can be satisfied."""
        try:
            self.candidates.plan(choice)
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
        return treatments_of(self.material.base, self.layers, layer, basis.globally)

    def ranking(self, basis: Choice) -> Sequence[tuple[str, ...]]:
        """Groups of layers, each around a weight or a value, by the harm that quantizing it does."""

        def measure() -> dict[str, Any]:
            table = self._table(basis)
            rows = [row for row in table.rows if row.unit.part in ("weight", "output", "value")]
            rows.sort(key=lambda row: -_harm(row, table))
            groups = (
                tuple(dict.fromkeys(name for q in row.unit.quantizers for name in self.layers.around.get(q, ())))
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
                for name in {name for q in row.unit.quantizers for name in self.layers.around.get(q, ())} & set(lost):
                    lost[name] += _alone(row)
            return {"layers": sorted(saved, key=lambda name: lost[name] / saved[name])}

        layers: Sequence[str] = self._log.once("fewer bits", _named(basis), measure)["layers"] if saved else []
        return layers

    def _savings(self, basis: Choice) -> dict[str, int]:
        """The bytes that fewer bits would save of each layer for which they do."""
        found: dict[str, int] = {}
        weights = self.candidates.plan(basis).weights
        for name, layer in self.layers.by_name.items():
            if any(key in weights and weights[key].bits > FEWER_BITS_N for key in layer.weights):
                fewer = basis.treating({name: FEWER_BITS})
                saved = self.cost(basis, timed=False).file_bytes - self.cost(fewer, timed=False).file_bytes
                if saved > 0:
                    found[name] = saved
        return found

    def _table(self, choice: Choice) -> Sensitivity:
        metric = self.material.metric
        table = sensitivity(
            self.candidates.simulation(choice),
            self._ranked_on(),
            metric,
            classes=metric.classes,
            jobs=self._jobs,
            make=CandidateMaker(self.material, self._fusions, choice),
        )
        self._on_table(table)
        return table

    def _ranked_on(self) -> Iterator[tuple[Batch, Any]]:
        n = 0
        for inputs, targets in self.candidates.labelled():
            yield inputs, targets
            n += len(pytree.tree_leaves(inputs)[0])
            if n >= RANKED_N:
                return

    def _identity(self) -> dict[str, Any]:
        material = self.material
        return {
            "edgeqat": __version__,
            "arithmetic": self.candidates.arithmetic,
            "plan": self.candidates.plan(BASE).program.plan_hash,
            "quantize": material.base.model_dump(mode="json"),
            "targets": list(material.targets),
            "metric": material.metric.identity(),
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
