"""Sensitivity: what each layer and each value costs when only it is quantized, and when only it is left in float."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import closing
from typing import Any

from torch.utils import _pytree as pytree

from edgeqat.diagnose.effects import Tally, drop_of
from edgeqat.diagnose.forks import Forks
from edgeqat.diagnose.ranges import Ranges, RangeTally, weight_ranges
from edgeqat.diagnose.sensitivity_table import Row, Sensitivity
from edgeqat.diagnose.switches import evaluating, quantizing, switchable, watching
from edgeqat.diagnose.units import Unit, units_of
from edgeqat.errors import DataError, PlanError
from edgeqat.metrics import Metric, MetricLike, resolve_metric
from edgeqat.signature import Batch
from edgeqat.simulate.model import SimulatedModel

__all__ = ["Settings", "sensitivity"]

NOTHING: frozenset[str] = frozenset()


class Settings:
    """What a simulation is run under, each set of switches once: a layer's input, say, is another one's output.

    Attributes:
        units: What is measured.
        everything: All switches.
        only: Each unit's own quantizers.
        without: Everything but them, and everything; without what `only` has already.
    """

    def __init__(self, sim: SimulatedModel) -> None:
        self.units: list[Unit] = units_of(sim)
        self.everything = switchable(sim)
        self.only = list(dict.fromkeys(frozenset(unit.quantizers) for unit in self.units))
        others = dict.fromkeys([*(self.everything - names for names in self.only), self.everything])
        self.without = [names for names in others if names and names not in self.only]

    def __len__(self) -> int:
        """How often each batch is run, in full or in part."""
        return len(self.only) + len(self.without)


def sensitivity(
    sim: SimulatedModel,
    batches: Iterable[Any],
    metric: MetricLike | None = None,
    *,
    classes: bool | None = None,
    on_run: Callable[[], None] | None = None,
) -> Sensitivity:
    """Measures what quantizing each layer, each of its parts and each other value does to the outputs.

    Every figure is the dequantized simulation's, in eval mode, against the float model: the same weights with
    quantization off. `sim` is left as it was, also where an error ends this.

    Args:
        sim: Calibrated, trained or not; in phase "quantized" or "converted".
        batches: Inputs; (inputs, targets) with a metric. A few hundred samples will do: standard errors are told.
        metric: A name, or a callable as `edgeqat.metrics.resolve_metric` takes it.
        classes: Whether the first output, where it is [N, C] or [N, C, H, W], is scores of classes, so that there is a
            KL divergence. None: what the metric says; without one, yes.
        on_run: Called after every run of a batch; `len(Settings(sim))` is how often that is for a batch.

    Raises:
        PhaseError: `sim` is not calibrated.
        PlanError: Nothing in it is quantized.
        DataError: There are fewer than 2 samples, the metric does not take them, or outputs are NaN or infinite.
        InputError: The metric is unknown.
    """
    chosen = None if metric is None else resolve_metric(metric)
    if classes is None and chosen is not None:
        classes = chosen.classes
    settings = Settings(sim)
    if not settings.units:
        raise PlanError("nothing in this model is quantized; edgeqat.plan(...) says why")
    with evaluating(sim):
        measuring = _Measuring(sim, settings, chosen, classes, on_run or (lambda: None))
        for batch in batches:
            inputs, targets = (batch, None) if chosen is None else batch
            measuring.look(inputs, targets)
        return measuring.table()


class _Measuring:
    """One measurement over all batches."""

    def __init__(
        self,
        sim: SimulatedModel,
        settings: Settings,
        metric: Metric | None,
        classes: bool | None,
        on_run: Callable[[], None],
    ) -> None:
        self.sim, self.settings, self.metric, self.classes, self.on_run = sim, settings, metric, classes, on_run
        self.forks = Forks(sim)
        quantizers = sim.activation_quantizers().items()
        self.values = {name: RangeTally(q) for name, q in quantizers if name in settings.everything}
        self.tallies: dict[frozenset[str], Tally] = {}
        self.n = 0

    def look(self, inputs: Batch, targets: Any) -> None:
        """Runs a batch under every setting."""
        with (
            quantizing(self.sim, NOTHING),
            watching(self.sim, self.values, lambda name, output: self.values[name].add(output)),
        ):
            reference = self.sim.call(inputs)
        if not self.n:
            self.classes = self.classes is not False and _are_scores(reference)
        self.n += len(pytree.tree_leaves(reference)[0])
        self._take(NOTHING, reference, reference, targets)
        for base, settings in ((NOTHING, self.settings.only), (self.settings.everything, self.settings.without)):
            with closing(self.forks.run(inputs, base, settings)) as runs:
                for index, outputs in runs:
                    self._take(settings[index], outputs, reference, targets)
                    self.on_run()

    def _take(self, names: frozenset[str], outputs: Any, reference: Any, targets: Any) -> None:
        if names not in self.tallies:
            self.tallies[names] = Tally(self.metric, bool(self.classes))
        self.tallies[names].add(outputs, reference, targets)

    def table(self) -> Sensitivity:
        """What was found.

        Raises:
            DataError: There was too little.
        """
        if not self.n:
            raise DataError("found no batches to analyse on, wanted at least one")
        everything, metric, tallies = self.settings.everything, self.metric, self.tallies
        effects = {names: tally.effect(tallies[NOTHING]) for names, tally in tallies.items()}
        gains = {}
        if metric is not None:
            gains = {n: drop_of(metric, tallies[everything - n], tallies[everything]) for n in self.settings.only}
        rows = []
        for unit in self.settings.units:
            own = frozenset(unit.quantizers)
            rows.append(Row(unit, effects[own], effects[everything - own], gains.get(own), self._ranges(unit)))
        return Sensitivity(
            n=self.n,
            metric=None if metric is None else metric.name,
            is_share=metric is not None and metric.is_share,
            float_metric=effects[NOTHING].metric,
            quantized=effects[everything],
            rows=tuple(rows),
        )

    def _ranges(self, unit: Unit) -> Ranges | None:
        if unit.part == "layer" or len(unit.quantizers) > 1:
            return None
        (name,) = unit.quantizers
        if name in self.values:
            return self.values[name].ranges()
        return weight_ranges(self.sim.weight_quantizers()[name], self.sim.get_parameter(name))


def _are_scores(outputs: Any) -> bool:
    """Whether the first output has the shape of classes' scores."""
    first = pytree.tree_leaves(outputs)[0]
    return bool(first.is_floating_point() and first.ndim in (2, 4) and first.shape[1] > 1)
