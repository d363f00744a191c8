"""Search: the cheapest plan that meets its limits, found by post-training quantization on held-out samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import nn

from edgeqat.diagnose.cheapest import Found, Limits, Trial, find_cheapest
from edgeqat.diagnose.jobs import Jobs, JobsOn
from edgeqat.diagnose.plan_trials import Material, PlanTrials
from edgeqat.errors import RecipeError
from edgeqat.factory import build_mapping
from edgeqat.graph.pixels import Pixels
from edgeqat.metrics import MetricLike, resolve_metric
from edgeqat.qconfig_mapping import QConfigMapping
from edgeqat.recipe_quantize import QuantizeSection
from edgeqat.signature import Batch
from edgeqat.validation import explain

__all__ = ["SearchResult", "describe_trial", "search", "search_trials"]


@dataclass(frozen=True, eq=False)
class SearchResult:
    """What a search found.

    Attributes:
        passed: Whether `best` meets every limit, on the samples that were searched on.
        best: The cheapest plan that does; where none does, the one that misses the limits by least.
        base: The plan as it was.
        why: Where none passes, what stands in the way.
        limits: What was to be met.
        trials: All that were made, in order.
        quantize: The settings of `best`, as the section of a recipe.
        is_share: Whether drops are of a share, and so told in points.
    """

    passed: bool
    best: Trial
    base: Trial
    why: str
    limits: Limits
    trials: tuple[Trial, ...]
    quantize: QuantizeSection
    is_share: bool

    @property
    def mapping(self) -> QConfigMapping:
        """The settings of `best`, as `prepare` takes them; what `quantize.ptq` asks for is done besides."""
        return build_mapping(self.quantize)

    @property
    def certain(self) -> bool:
        """Whether the verdict on the drop of `best` is further from the limit than its standard error."""
        limit, outcome = self.limits.max_drop, self.best.outcome
        return limit is None or outcome.drop is None or abs(outcome.drop - limit) > outcome.standard_error

    def __str__(self) -> str:
        lines = [f"  {describe_trial(trial, self.is_share)}" for trial in self.trials]
        verdict = "the cheapest plan that passes" if self.passed else f"no plan passes: {self.why}; the nearest"
        doubt = "" if self.certain else "; the limit is within the standard error of the drop"
        best = describe_trial(self.best, self.is_share)
        return "\n".join([f"{len(self.trials)} trials", *lines, f"{verdict}: {best}{doubt}"])


def search(
    model: nn.Module,
    calibration: Iterable[Batch],
    batches: Iterable[tuple[Batch, Any]],
    *,
    limits: Limits,
    target: str | Sequence[str] = "onnxruntime",
    metric: MetricLike = "top1",
    quantize: QuantizeSection | Mapping[str, Any] | None = None,
    pixels: Pixels | None = None,
    log: str | Path | None = None,
    max_trials: int = 100,
    on_trial: Callable[[Trial, tuple[str, ...]], None] | None = None,
    jobs: int = 1,
    jobs_on: JobsOn = "processes",
) -> SearchResult:
    """Searches for the cheapest plan that meets the limits: other observers, bits, or float for single layers.

    Each trial is the model quantized after training, in the integers of the first target where its arithmetic is
    known. Drops are measured in pairs on `batches` and chosen by: judge the result on other samples than these.

    Args:
        model: The float model; left as it is.
        calibration: Batches of inputs: something that can be iterated again and again.
        batches: (inputs, targets), likewise, neither trained nor tested on.
        limits: What to meet.
        target: As `prepare` takes it.
        metric: A name, or a callable as `edgeqat.metrics.resolve_metric` takes it.
        quantize: The settings to begin with, as a recipe's `quantize` section or its keys; None for the defaults.
        pixels: As `prepare` takes it.
        log: A file in which each measurement is kept: a search that was stopped makes none of them twice.
        max_trials: The most trials that are made.
        on_trial: Called with every trial, and the names of the limits that it misses.
        jobs: Trials that are made at a time, each in a process of its own with an equal share of the threads; what is
            found is the same as with 1 and so many threads.
        jobs_on: "processes" of this machine, or "ray", those of a cluster.

    Raises:
        CaptureError, PlanError: As `prepare`, for the settings to begin with.
        DataError: There is no batch, or outputs or targets that the metric does not take.
        RecipeError: `quantize` does not fit the schema.
        InputError: The metric is unknown; with jobs, the model or data cannot be sent to another process.
        JobError: The system ended a job.
        MissingRuntimeError: Ray is asked for and not installed.
    """
    try:
        base = quantize if isinstance(quantize, QuantizeSection) else QuantizeSection.model_validate(quantize or {})
    except ValidationError as error:
        raise RecipeError(f"quantize: {explain(error, QuantizeSection)}") from error
    targets = [target] if isinstance(target, str) else list(target)
    material = Material(model, calibration, batches, base, targets, resolve_metric(metric), pixels)
    with Jobs(jobs, jobs_on) as own:
        trials = PlanTrials(material, None if log is None else Path(log), jobs=own)
        return search_trials(trials, limits, max_trials, on_trial)


def search_trials(
    trials: PlanTrials,
    limits: Limits,
    max_trials: int = 100,
    on_trial: Callable[[Trial, tuple[str, ...]], None] | None = None,
) -> SearchResult:
    """Searches the plans that `trials` can make; see `search`."""
    found: Found = find_cheapest(trials, limits, max_trials, on_trial)
    return SearchResult(
        found.passed,
        found.best,
        found.base,
        found.why,
        limits,
        found.trials,
        trials.section(found.best.choice),
        trials.material.metric.is_share,
    )


def describe_trial(trial: Trial, is_share: bool) -> str:
    """`conv1 float: drop +0.12 +- 0.05 points on 500 samples, 3.71x smaller`."""
    outcome, cost = trial.outcome, trial.cost
    if outcome.drop is None:
        return f"{trial.choice.describe()}: refused, {outcome.refused}"
    scale, unit = (100, " points") if is_share else (1, "")
    drop = f"drop {scale * outcome.drop:+.3g} +- {scale * outcome.standard_error:.2g}{unit} on {outcome.n} samples"
    speed = "" if cost.speedup is None else f", {cost.speedup:.2f}x faster"
    return f"{trial.choice.describe()}: {drop}, {cost.size_ratio:.2f}x smaller{speed}"
