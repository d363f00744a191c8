"""`run --auto`: as little as is needed. PTQ if that is enough; else a search for another plan, and QAT.

    float -> PTQ, the recipe's own plan                      passes: PTQ is enough
          -> sensitivity, search on the validation samples
          -> PTQ, the plan found, if it passes there
          -> QAT, the recipe's own plan
          -> QAT, the plan found

Each step is a run of its own in `steps/`, with a recipe of its own, and is resumed like any other; the first that
passes the gate ends it. Choices are made on validation samples; the test samples are looked at once a step.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from edgeqat.diagnose.cheapest import Limits, Trial
from edgeqat.diagnose.jobs import Jobs
from edgeqat.diagnose.plan_trials import Material, PlanTrials
from edgeqat.diagnose.search import SearchResult, describe_trial, search_trials
from edgeqat.diagnose.sensitivity_table import Sensitivity
from edgeqat.factory import build_model, check_not_random
from edgeqat.files import to_json, write_atomically
from edgeqat.intervals import Z_95
from edgeqat.pipeline import OpenedRun, carry_out, finished_before, open_run, write_report
from edgeqat.processes import check_alone
from edgeqat.recipe import LogSection, Recipe, load_recipe
from edgeqat.recipe_quantize import QuantizeSection
from edgeqat.reporting.monitor import Monitor, Silent
from edgeqat.reporting.pictures import FOLDER as SAMPLES
from edgeqat.reporting.schema import AutoRow, AutoStep, Report, Row
from edgeqat.reporting.summary import change
from edgeqat.run_folder import claimed
from edgeqat.tracking import tracked
from edgeqat.training_stages import open_store, stages_of, train_float

__all__ = ["run_auto"]

MENDABLE = {"max_drop", "min_size_ratio", "min_speedup"}
"""Checks that another plan may turn; parity is owed by any."""

RECIPE = "recipe.auto.yaml"
FLOAT_WEIGHTS = "checkpoints/float.safetensors"


def run_auto(
    recipe: Recipe | str | Path,
    out_dir: str | Path,
    overwrite: bool = False,
    monitor: Monitor | None = None,
    resume: bool = False,
) -> Report:
    """Finds out what a recipe needs to pass its gate; see the head of this file.

    Args:
        recipe: A recipe, the name of a bundled one, or a YAML file.
        out_dir: Where everything is written: `recipe.auto.yaml` reproduces what the report is about.
        overwrite: Replace the run that `out_dir` holds.
        monitor: Told of progress.
        resume: Continue the unfinished run that `out_dir` holds.

    Returns:
        The report of the step that passed; where none did, of the one that missed by least.

    Raises:
        InputError, MissingRuntimeError: As `pipeline.run`; MissingRuntimeError also where the search is to run on Ray,
            which is not installed.
    """
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(str(recipe))
    check_alone(recipe.compute, "run --auto")
    monitor, folder = Silent() if monitor is None else monitor, Path(out_dir)
    finished = finished_before(recipe, folder, overwrite, resume, monitor)
    if finished is not None:
        return finished
    jobs = Jobs(recipe.compute.jobs, recipe.compute.jobs_on)  # what is not installed is said before data is loaded
    opened = open_run(recipe, folder, monitor)
    if recipe.train is not None and recipe.train.float_epochs == 0:  # the first step judges what is loaded
        check_not_random(recipe.model, recipe.train.seed)
    with claimed(folder, overwrite, resume):
        write_atomically(folder / "recipe.yaml", recipe.to_yaml())
        with tracked(recipe.log, folder) as opened.work.tracking:
            return _Auto(opened, jobs).run()


@dataclass(eq=False)
class _Step:
    recipe: Recipe
    report: Report
    folder: Path


@dataclass(eq=False)
class _Auto:
    opened: OpenedRun
    jobs: Jobs
    done: list[_Step] = field(default_factory=list)
    told: list[AutoStep] = field(default_factory=list)
    trials: int = 0

    def __post_init__(self) -> None:
        self.work = self.opened.work
        self.asked, self.folder, self.monitor = self.work.recipe, self.work.folder, self.work.monitor
        self.started = self._started()

    def run(self) -> Report:
        ptq = self._step("1-ptq", "PTQ, the recipe's own plan", self._ptq(self.asked.quantize))
        failing = _failing(ptq)
        if not failing:
            return self._end(ptq, "PTQ is enough")
        if not failing & MENDABLE:
            return self._end(ptq, f"the gate fails on {_named(failing)}, which no other plan mends")
        found = self._search()
        other, trains = found.quantize != self.asked.quantize, self._trains()
        if other and (found.passed or not trains):
            step = self._step("2-search", "PTQ, the plan found", self._ptq(found.quantize))
            if step.report.gate.passed:
                return self._end(step, f"PTQ is enough with another plan: {found.best.choice.describe()}")
        if trains and failing <= {"max_drop"}:  # training changes neither size nor speed
            step = self._step("3-qat", "QAT, the recipe's own plan", self._qat(self.asked.quantize))
            if step.report.gate.passed:
                return self._end(step, "QAT is enough, with the recipe's own plan")
        if trains and other:
            step = self._step("4-search-qat", "QAT, the plan found", self._qat(found.quantize))
            if step.report.gate.passed:
                return self._end(step, f"QAT is enough with another plan: {found.best.choice.describe()}")
        best = min(self.done, key=lambda step: _misses(step.report))
        best_trial = describe_trial(found.best, self.work.metric.is_share)
        why = f"; the search: {found.why}, its best is {best_trial}" if found.why else ""
        nearest = f"{self._what(best)} ({_checks(best.report)})"
        return self._end(best, f"nothing passes the gate{why}; the nearest is {nearest}")

    def _started(self) -> Recipe:
        """The recipe as every step has it: it begins with the float weights that are trained here, once."""
        train = self.asked.train
        if train is None or (train.float_epochs == 0 and self.asked.model.weights is not None):
            return self.asked
        model = build_model(self.asked.model, train.seed)
        train_float(self.work, model, open_store(self.work, self.opened.planned))
        weights = str((self.folder / FLOAT_WEIGHTS).resolve())
        return self.asked.model_copy(
            update={
                "model": self.asked.model.model_copy(update={"weights": weights}),
                "train": train.model_copy(update={"float_epochs": 0}),
            }
        )

    def _ptq(self, quantize: QuantizeSection) -> Recipe:
        return self.started.model_copy(update={"quantize": quantize, "train": None})

    def _qat(self, quantize: QuantizeSection) -> Recipe:
        return self.started.model_copy(update={"quantize": quantize})

    def _trains(self) -> bool:
        train = self.asked.train
        return train is not None and any(stage.epochs for stage in stages_of(train, "qat"))

    def _step(self, name: str, what: str, recipe: Recipe) -> _Step:
        """A run of its own in `steps/`, as far as it is not done; the float twin is fine-tuned in one of them only."""
        self.monitor.stage(f"auto: {what}")
        folder = self.folder / "steps" / name
        report = finished_before(recipe, folder, False, True, self.monitor)
        if report is None:
            opened = open_run(recipe, folder, self.monitor, self.work.data)
            twins = (step.folder / "checkpoints" / "float_finetuned.safetensors" for step in self.done)
            with claimed(folder, resume=True):
                write_atomically(folder / "recipe.yaml", recipe.to_yaml())
                with tracked(_log_of(recipe.log, name), folder) as opened.work.tracking:
                    report = carry_out(opened, next((twin for twin in twins if twin.exists()), None))
        step = _Step(recipe, report, folder)
        self.done.append(step)
        row = max(_gated(report), key=lambda row: 0.0 if row.drop is None else row.drop)
        failing = _failing(step)
        verdict = f"fails on {_named(failing)}" if failing else "passes the gate"
        self._tell(what, row.drop, row.drop_ci95, f"{verdict} ({_checks(report)})", f"steps/{name}")
        return step

    def _search(self) -> SearchResult:
        """Sensitivity and search, on samples that are neither trained, calibrated nor tested on."""
        work, gate = self.work, self.asked.gate
        # Without labels there is no validation part, and calibration samples are what is left.
        judged = work.data.validation if len(work.data.validation) else work.data.calibration
        self.monitor.stage(f"auto: search for another plan, on {len(judged)} samples that are not tested on")
        recipe = self._ptq(self.asked.quantize)
        material = Material(
            build_model(recipe.model, 0),
            work.batches(work.data.calibration).inputs(),
            work.batches(judged),
            self.asked.quantize,
            self.asked.export,
            work.metric,
            work.pixels,
            self.asked.measure.threads,
            self.asked.measure.batch,
        )
        place = self.folder / "search"
        limits = Limits(gate.max_drop, gate.min_size_ratio, gate.min_speedup)

        def tell(trial: Trial, missed: tuple[str, ...]) -> None:
            verdict = f"misses {_named(missed)}" if missed else "passes"
            self.monitor.line(f"{describe_trial(trial, work.metric.is_share)}: {verdict}")

        if self.jobs.n > 1:
            self.monitor.line(str(self.jobs))
        with self.jobs:
            trials = PlanTrials(material, place / "trials.jsonl", self._keep_table, self.jobs)
            found = search_trials(trials, limits, on_trial=tell)
        self.trials = len(found.trials)
        best = found.best.outcome
        sure = "" if found.certain else ", by less than the standard error"
        verdict = f"passes{sure}" if found.passed else f"nothing passes: {found.why}"
        words = f"search, {self.trials} trials, best: {describe_trial(found.best, work.metric.is_share)}"
        interval = None
        if best.drop is not None:
            interval = (best.drop - Z_95 * best.standard_error, best.drop + Z_95 * best.standard_error)
        self._tell(words, best.drop, interval, verdict, None)
        return found

    def _keep_table(self, table: Sensitivity) -> None:
        """The first table is that of the recipe's own plan, or of the observer that did better."""
        path = self.folder / "search" / "sensitivity.json"
        if not path.exists():
            write_atomically(path, to_json(table.to_dict()))
            first = [row.unit.name for row in table.ranked()[:3]]
            self.monitor.line(f"most sensitive: {', '.join(first)}")

    def _tell(
        self, what: str, drop: float | None, interval: tuple[float, float] | None, verdict: str, folder: str | None
    ) -> None:
        step = AutoStep(
            what=what, drop=drop, drop_ci95=interval, test=folder is not None, verdict=verdict, folder=folder
        )
        self.told.append(step)
        self.monitor.line(f"auto: {what}: {verdict}")

    def _what(self, step: _Step) -> str:
        place = f"steps/{step.folder.name}"
        return next(told.what for told in self.told if told.folder == place)

    def _end(self, step: _Step, conclusion: str) -> Report:
        """Puts the artifacts and the report of a step at the head of the run, and writes the recipe behind them."""
        self.monitor.stage(f"auto: {conclusion}")
        for name in ("artifacts", "latency", SAMPLES):
            shutil.rmtree(self.folder / name, ignore_errors=True)
            if (step.folder / name).is_dir():  # there are no pictures of what is no image
                shutil.copytree(step.folder / name, self.folder / name)
        # A path in a recipe is relative to its file, so that the directory can be moved.
        relative = step.recipe
        if step.recipe.model.weights != self.asked.model.weights:
            relative = step.recipe.model_copy(
                update={"model": step.recipe.model.model_copy(update={"weights": FLOAT_WEIGHTS})}
            )
        write_atomically(self.folder / RECIPE, relative.to_yaml())
        auto = AutoRow(
            steps=self.told,
            conclusion=conclusion,
            looks_at_test=len(self.done),
            trials=self.trials,
            recipe=RECIPE,
        )
        report = step.report.model_copy(update={"auto": auto})
        self.work.tracking.end(report, self.folder)
        write_report(report, self.folder)
        return report


def _log_of(section: LogSection, step: str) -> LogSection:
    """Where a step logs to: in TensorBoard's folder its curves have one of their own."""
    if section.tensorboard is None:
        return section
    return section.model_copy(update={"tensorboard": str(Path(section.tensorboard) / step)})


def _failing(step: _Step) -> set[str]:
    """The names of the checks that a step fails."""
    return {check.name for check in step.report.gate.checks if not check.passed}


def _named(failing: Collection[str]) -> str:
    return " and ".join(sorted(failing))


def _gated(report: Report) -> list[Row]:
    """The rows that the gate is about: the last variant's, on each runtime that is checked."""
    runtimes = {check.runtime for check in report.gate.checks}
    variant = report.results[-1].variant
    rows = [row for row in report.results if row.variant == variant and row.runtime != "simulation"]
    return [row for row in rows if row.runtime in runtimes or not runtimes]


def _checks(report: Report) -> str:
    """`max_drop +0.12 of +0.30, min_size_ratio 3.71 of 3.5`."""
    is_share, found = report.results[0].metric.is_share, []
    for check in report.gate.checks:
        if check.name == "max_drop":
            found.append(f"max_drop {change(check.value, is_share)} of {change(check.limit, is_share)}")
        else:
            found.append(f"{check.name} {check.value:.4g} of {check.limit:.4g}")
    return ", ".join(found) or "no limit is set"


def _misses(report: Report) -> tuple[int, float]:
    """How far a report is from the gate: how many checks fail, then the largest drop."""
    return (
        sum(not check.passed for check in report.gate.checks),
        max(row.drop or 0.0 for row in _gated(report)),
    )
