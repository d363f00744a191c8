"""Sensitivity: what each layer and each value costs when only it is quantized, and when only it is left in float."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

from edgeqat.arguments import INPUTS, PAIRS, check_batches, check_made, pair_of
from edgeqat.data.fingerprint import fingerprint
from edgeqat.diagnose.effects import Tally, drop_of
from edgeqat.diagnose.jobs import Jobs
from edgeqat.diagnose.looks import NOTHING, Labelled, Look, Looker, LookLog, Settings
from edgeqat.diagnose.ranges import Ranges, RangeTally, weight_ranges
from edgeqat.diagnose.sensitivity_table import Row, Sensitivity
from edgeqat.diagnose.switches import evaluating
from edgeqat.diagnose.trial_log import TrialLog
from edgeqat.diagnose.units import Unit
from edgeqat.errors import DataError, InputError, PlanError
from edgeqat.metrics import Metric, MetricLike, resolve_metric
from edgeqat.simulate.model import SimulatedModel
from edgeqat.version import __version__

__all__ = ["Settings", "sensitivity"]


def sensitivity(
    sim: SimulatedModel,
    batches: Iterable[Any],
    metric: MetricLike | None = None,
    *,
    classes: bool | None = None,
    on_run: Callable[[], None] | None = None,
    log: str | Path | None = None,
    jobs: Jobs | None = None,
    make: Callable[[], SimulatedModel] | None = None,
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
        log: A file in which what each batch shows is kept: an analysis that was stopped measures none of it twice,
            and neither does another one of the same simulation and metric.
        jobs: Processes that batches and settings are shared out to; all batches are then held at once. The figures
            are those of this process with as many threads as a job has, to the bit.
        make: Makes `sim` anew in another process, not calibrated, such as
            `functools.partial(edgeqat.prepare, model, example_inputs)`; wanted where jobs are.

    Raises:
        PhaseError: `sim` is not calibrated.
        PlanError: Nothing in it is quantized.
        DataError: There are fewer than 2 samples, the metric does not take them, or outputs are NaN or infinite.
        InputError: The metric is unknown, `sim` or the batches are something else, or what jobs want cannot be sent to
            them.
        JobError: The system ended a job.
        OutputError: The log cannot be written.
    """
    check_made(sim, SimulatedModel)
    check_batches(batches, INPUTS if metric is None else PAIRS)
    chosen = None if metric is None else resolve_metric(metric)
    if classes is None and chosen is not None:
        classes = chosen.classes
    settings = Settings(sim)
    if not settings.units:
        raise PlanError("nothing in this model is quantized; edgeqat.plan(...) says why")
    kept = None if log is None else LookLog(TrialLog(Path(log), _identity(sim, chosen, classes)), settings)
    given: Iterable[Labelled] = (
        ((inputs, None) for inputs in batches) if chosen is None else (pair_of(batch) for batch in batches)
    )
    looker, measuring = Looker(sim, settings, chosen, classes), _Measuring(sim, settings, chosen)
    with evaluating(sim), closing(_looks(looker, given, kept, on_run or (lambda: None), jobs, make)) as looks:
        for look in looks:
            measuring.take(look)
        return measuring.table()


def _looks(
    looker: Looker,
    given: Iterable[Labelled],
    kept: LookLog | None,
    tell: Callable[[], None],
    jobs: Jobs | None,
    make: Callable[[], SimulatedModel] | None,
) -> Generator[Look, None, None]:
    """A look at each batch, made here or by jobs."""
    if jobs is None or jobs.n == 1:
        return looker.all(given, kept, tell)
    if make is None:
        raise InputError("found jobs and no `make`, without which other processes cannot make the simulation")
    return looker.all_by_jobs(given, kept, tell, jobs, make)


def _identity(sim: SimulatedModel, metric: Metric | None, classes: bool | None) -> dict[str, Any]:
    """What every look at a batch depends on."""
    return {
        "edgeqat": __version__,
        "plan": sim.plan.program.plan_hash,
        "state": fingerprint(sim.state_dict()),
        "metric": None if metric is None else metric.identity(),
        "classes": classes,
    }


class _Measuring:
    """One measurement over all batches."""

    def __init__(self, sim: SimulatedModel, settings: Settings, metric: Metric | None) -> None:
        self.sim, self.settings, self.metric = sim, settings, metric
        quantizers = sim.activation_quantizers().items()
        self.values = {name: RangeTally(q) for name, q in quantizers if name in settings.everything}
        self.tallies = {names: Tally(metric) for names in settings.all}
        self.n = 0

    def take(self, look: Look) -> None:
        """Takes what a batch shows under all settings."""
        self.n += len(look.figures[NOTHING].signal)
        for names, figures in look.figures.items():
            self.tallies[names].take(figures)
        for name, seen in look.ranges.items():
            self.values[name].join(seen)

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
