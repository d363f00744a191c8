"""The whole pipeline, stage by stage, in one place.

load -> train float -> export float
                    -> prepare, calibrate -> convert, lower, verify        (ptq)
                    -> fine-tune float -> export float                     (float_finetuned)
                    -> prepare, calibrate, fit -> convert, lower, verify   (qat)
     -> measure all of them, interleaved -> gate -> report

Training is checkpointed, see training_stages.py; a resumed run redoes what comes after it, see artifact_stages.py.
Where several processes train, see processes.py, each of them comes here; files are made by the first one alone.
"""

from __future__ import annotations

import contextlib
import copy
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from edgeqat.arguments import named
from edgeqat.artifact_stages import lower_all, measure_all, verify_all
from edgeqat.callables import USER_ERRORS
from edgeqat.data.dataset import Dataset, Samples, describe, named_leaves
from edgeqat.data.folders import describe_parts
from edgeqat.data.sources import has_own_shape, load
from edgeqat.data.split_line import split_line, split_warning
from edgeqat.data.tables import is_table_folder
from edgeqat.diagnose.distributions import samples_within
from edgeqat.errors import DataError, InputError, MissingRuntimeError, ModelError, RecipeError
from edgeqat.factory import build_fusions, build_loss, build_mapping, build_model, check_not_random
from edgeqat.files import to_json, write_atomically
from edgeqat.graph.pixels import Pixels
from edgeqat.lowering.to_aoti import check_compiler
from edgeqat.machine import installed_runtimes
from edgeqat.measuring.variant import Variant
from edgeqat.metrics import evaluate
from edgeqat.named_models import named_model
from edgeqat.planning import Plan, plan
from edgeqat.processes import team_of
from edgeqat.ptq_stage import read_aids
from edgeqat.qconfig_mapping import QConfigMapping
from edgeqat.ranks import ALONE, Ranks
from edgeqat.recipe import Recipe, load_recipe
from edgeqat.reporting.build import Insight, build_report
from edgeqat.reporting.monitor import Monitor, Silent
from edgeqat.reporting.network import network_of
from edgeqat.reporting.page import render_page
from edgeqat.reporting.pictures import flipped, write_pictures
from edgeqat.reporting.schema import Report, read_report
from edgeqat.run_context import AGREEMENT, Run, loading_of
from edgeqat.run_folder import FolderState, check_free, check_there, claimed
from edgeqat.signature import Batch, call
from edgeqat.target_rules import resolve_targets
from edgeqat.target_table import runtime_of
from edgeqat.tracking import check_trackers, tracked
from edgeqat.train.distillation import check_distillable
from edgeqat.train.losses import check_loss
from edgeqat.train.store import CheckpointStore, first_difference
from edgeqat.training_stages import adopt_twin, curves, open_store, stages_of, train_and_convert

__all__ = [
    "OpenedRun",
    "begin",
    "carry_out",
    "check_same",
    "check_task",
    "finished_before",
    "open_run",
    "plan_recipe",
    "run",
    "write_report",
]

PATIENCE = timedelta(days=2)
"""How long the processes that only train wait for the one that makes, proves and measures the files."""


def run(
    recipe: Recipe | str | Path,
    out_dir: str | Path,
    overwrite: bool = False,
    monitor: Monitor | None = None,
    resume: bool = False,
) -> Report:
    """Runs a recipe from data to report; see the head of this file.

    Everything that can be wrong with the input is found before `out_dir` is touched. Of several processes, as torchrun
    starts them, each calls this, and gets the same report.

    Args:
        recipe: A recipe, the name of a bundled one, or a YAML file.
        out_dir: Where everything is written.
        overwrite: Replace the run that `out_dir` holds.
        monitor: Told of progress.
        resume: Continue the unfinished run that `out_dir` holds: it ends with the integers of an uninterrupted one.
            Begins at the beginning where there is none; returns the report of a finished one.

    Raises:
        InputError: The recipe, its data, model or settings, or `out_dir` cannot be used, or the run to be resumed
            had another recipe.
        MissingRuntimeError: A runtime that it exports to is not installed.
    """
    if not isinstance(recipe, (Recipe, str, Path)):
        raise InputError(
            f"found {named(recipe)}, wanted a bundled recipe's name or a YAML file; write it to one, or pass "
            "edgeqat.recipe.Recipe(**settings)"
        )
    recipe, folder = recipe if isinstance(recipe, Recipe) else load_recipe(str(recipe)), Path(out_dir)
    with team_of(recipe.compute) as team:
        ranks, told = team.ranks, Silent() if monitor is None or not team.ranks.first else monitor
        with ranks.together():
            finished = finished_before(recipe, folder, overwrite, resume, told) if ranks.first else None
        finished = ranks.of_first(finished)
        if finished is not None:
            return finished
        with ranks.together():
            opened = open_run(recipe, folder, told)
        opened.work.team = team
        with contextlib.ExitStack() as claim:
            with ranks.together():
                if ranks.first:
                    claim.enter_context(claimed(folder, overwrite, resume))
                    write_atomically(folder / "recipe.yaml", recipe.to_yaml())
                    opened.work.tracking = claim.enter_context(tracked(recipe.log, folder))
            return carry_out(opened)


def finished_before(recipe: Recipe, folder: Path, overwrite: bool, resume: bool, monitor: Monitor) -> Report | None:
    """The report of the finished run that is to be resumed; None where there is something to be done.

    Raises:
        InputError: `folder` may not be written to, or holds a run of another recipe.
    """
    if overwrite and resume:
        raise InputError("found both resume and overwrite, wanted one of them")
    held = check_free(folder, overwrite, resume)
    if not resume or held is FolderState.FREE:
        return None
    check_same(recipe, folder)
    if held is not FolderState.FINISHED:
        return None
    monitor.stage(f"the run in {folder} is finished")
    return read_report(folder)


@dataclass(frozen=True, eq=False)
class OpenedRun:
    """A run before anything of it is written: what it works on, its float model, and the plan of that."""

    work: Run
    model: nn.Module
    planned: Plan


def open_run(recipe: Recipe, folder: Path, monitor: Monitor, data: Dataset | None = None) -> OpenedRun:
    """Loads data, unless it is given, and model, and finds what is wrong with them; touches no file.

    Raises:
        InputError, MissingRuntimeError: As `run`.
    """
    work, model, planned = begin(recipe, folder, monitor, data)
    check_feasible(work, model)
    return OpenedRun(work, model, planned)


def carry_out(opened: OpenedRun, twin: Path | None = None) -> Report:
    """Does all that a run does, into its folder, which is `claimed`.

    Args:
        opened: The run.
        twin: Weights of the fine-tuned float twin, where another run of the same training has them already.
    """
    work, ranks = opened.work, Ranks(patience=PATIENCE) if opened.work.team.ranks.size > 1 else ALONE
    store = open_store(work, opened.planned)
    if twin is not None:
        adopt_twin(work, store, opened.model, twin)
    variants = train_and_convert(work, opened.model, store)
    with ranks.together():
        report = _prove(opened, variants, store) if ranks.first else None
    report = ranks.of_first(report)
    assert report is not None
    return report


def _prove(opened: OpenedRun, variants: list[Variant], store: CheckpointStore) -> Report:
    """Makes the files of all variants, compares and measures them, and writes what was found."""
    work, recipe, folder = opened.work, opened.work.recipe, opened.work.folder
    if recipe.task.metric == AGREEMENT:
        work.data = replace(work.data, test=_labelled_by(work, variants[0].model))
    check_there(folder / "recipe.yaml")
    lower_all(work, variants)
    verify_all(work, variants)
    measure_all(work, variants)
    judged = variants[-1]
    network = network_of(judged, work.example(samples_within(judged.program)))
    seen = Insight(str(opened.planned), network, curves(store, recipe.train), read_aids(folder))
    report = build_report(recipe, work.data, work.batches(work.data.test), variants, work.metric, seen)
    write_pictures(work.data.test, flipped(report), folder)
    work.tracking.end(report, folder)
    write_report(report, folder)
    return report


def write_report(report: Report, folder: Path) -> None:
    """Writes report.html, then report.json, which says that the run is complete."""
    check_there(folder / "recipe.yaml")
    write_atomically(folder / "report.html", render_page(report, folder))
    write_atomically(folder / "report.json", to_json(report.to_dict()))


def begin(recipe: Recipe, folder: Path, monitor: Monitor, data: Dataset | None = None) -> tuple[Run, nn.Module, Plan]:
    """What a recipe begins with: its data, unless given, its model before any training, the plan; writes nothing.

    Raises:
        InputError: The recipe, its data, model or settings cannot be used.
    """
    named_model(recipe.model.factory)  # what is not installed is said before data is loaded
    check_trackers(recipe.log)
    if data is None:
        monitor.stage(f"load {recipe.data.source}")
        data = load_data(recipe)
        monitor.line(split_line(data))
        warning = None if recipe.train is None else split_warning(data)
        if warning is not None:
            monitor.line(f"warning: {warning}")
        _tell_parts(recipe.data.source, monitor)
    work = Run(recipe, folder, data, monitor)
    model = build_model(recipe.model, 0 if recipe.train is None else recipe.train.seed)
    _check_takes(model, work)
    return work, model, _planned(recipe, model, work.example(), work.pixels)


def _tell_parts(source: str, monitor: Monitor) -> None:
    """Says which folders are read, where a folder of images has some for training and for the test."""
    folder = Path(source)
    told = describe_parts(folder) if folder.is_dir() and not is_table_folder(folder) else None
    if told is not None:
        monitor.line(told)


REPLACE = "resume it with its own, replace it with --overwrite, or choose another directory"


def check_same(recipe: Recipe, folder: Path, advice: str = REPLACE) -> None:
    """Checks that a directory holds a run of this very recipe; else `advice` is given.

    Raises:
        RecipeError: It holds one of another.
    """
    held = load_recipe(str(folder / "recipe.yaml"))
    difference = first_difference(held.identity(), recipe.identity())
    if difference is not None:
        raise RecipeError(f"{folder} holds a run of another recipe: {difference}; {advice}")


def plan_recipe(recipe: Recipe) -> Plan:
    """The plan of a recipe's model; nothing is trained, and data is loaded only for what is not known else."""
    model = build_model(recipe.model, 0 if recipe.train is None else recipe.train.seed)
    data, wanted = recipe.data, recipe.data.input == "pixels"
    pixels = Pixels(data.mean, data.std) if wanted and data.mean is not None and data.std is not None else None
    if has_own_shape(data.source) or (wanted and pixels is None):
        work = Run(recipe, Path(), load_data(recipe), Silent())
        _check_takes(model, work)
        return _planned(recipe, model, work.example(), work.pixels)
    dtype = torch.uint8 if wanted else torch.float32
    return _planned(recipe, model, torch.zeros(2, 3, data.image_size, data.image_size, dtype=dtype), pixels)


def _planned(
    recipe: Recipe, model: nn.Module, example: Batch, pixels: Pixels | None, mapping: QConfigMapping | None = None
) -> Plan:
    """The plan of a recipe; of a stage of its training, which has a mapping of its own."""
    quantize = recipe.quantize
    mapping = build_mapping(quantize) if mapping is None else mapping
    mode, fusions, opaque = quantize.in_training, build_fusions(quantize), quantize.opaque
    return plan(model, example, recipe.export, mapping, fusions, batch_norm=mode, opaque=opaque, pixels=pixels)


def load_data(recipe: Recipe) -> Dataset:
    """The data of a recipe."""
    data = recipe.data
    return load(
        data.source,
        image_size=data.image_size,
        mean=data.mean,
        std=data.std,
        calibration_n=data.calibration_n,
        needs_labels=recipe.train is not None or recipe.task.metric != AGREEMENT,
        resize=data.resize,
        storage=data.storage,
        shuffle_buffer=data.shuffle_buffer,
        max_corrupt=data.max_corrupt,
        loading=loading_of(recipe),
    )


def _check_takes(model: nn.Module, work: Run) -> None:
    example = work.example(user_model=True)
    try:
        with torch.no_grad():
            call(copy.deepcopy(model).eval(), example)
    except USER_ERRORS as error:
        # The model is the user's code, which may raise anything.
        found = ", ".join(f"{name} {describe(leaf)}" for name, leaf in named_leaves("inputs", example).items())
        raise ModelError(
            f"{work.recipe.model.factory}: the model does not take a batch of {work.data.source}, {found}: "
            f"{type(error).__name__}: {error}; check model.factory, model.args and the data"
        ) from error


def check_feasible(work: Run, model: nn.Module) -> None:
    """Checks before anything is trained what would else be found only after it.

    Raises:
        RecipeError: An unknown loss or metric, or a gate on a runtime that is not exported.
        DataError: An augmentation that is unknown or does not fit, too few test samples for measure.batch, or outputs
            and targets that the metric does not take.
        PlanError: A stage of progressive training has bits that a target does not take.
        ModelError: The loss of one batch cannot be computed, or has no gradient.
        MissingRuntimeError: A runtime that is exported to is not installed.
    """
    recipe, data = work.recipe, work.data
    work.metric  # noqa: B018  refused now, not after training
    exported = resolve_targets(recipe.export)
    runtimes = [runtime_of(rule.name) for rule in exported]
    for runtime in recipe.gate.runtimes or ():
        if runtime not in runtimes:
            raise RecipeError(f"gate.runtimes: found {runtime!r}, wanted runtimes of export, {runtimes}")
    batch, test_n = recipe.measure.batch, len(data.test)
    if batch > test_n:
        raise DataError(f"measure.batch is {batch}, but there are {test_n} test samples; lower it")
    for runtime in dict.fromkeys(rule.runtime for rule in exported):
        if installed_runtimes()[runtime] is None:
            raise MissingRuntimeError(runtime, runtime, "not all of its packages are installed")
        if runtime == "aoti":
            check_compiler()
    if recipe.train is not None:
        for stage in stages_of(recipe.train, "qat")[:-1]:
            _planned(recipe, model, work.example(), work.pixels, stage.mapping(recipe))
    check_task(work, model)


def check_task(work: Run, model: nn.Module) -> None:
    """Checks that what a recipe wants can be trained and evaluated: loss and metric of one batch.

    Raises:
        RecipeError: An unknown loss or metric, or one that cannot be watched in training.
        DataError: An augmentation does not fit, outputs and targets do not fit the metric, or it has too few samples.
        ModelError: The loss cannot be computed, or has no gradient; or nothing is trained, and the weights are random.
    """
    task, data, loss = work.recipe.task, work.data, build_loss(work.recipe.task.loss)
    train = work.recipe.train
    if train is None or train.float_epochs + train.qat_epochs + sum(stage.epochs for stage in train.progressive) == 0:
        check_not_random(work.recipe.model, 0 if train is None else train.seed)
    if work.recipe.train is not None:
        if task.metric == AGREEMENT:
            # Validation while training has no other model's predictions to compare with.
            raise RecipeError("task.metric: agreement needs train: null; to train, choose a metric of the labels")
        work.batches(data.train, train=True)
    inputs, targets = next(iter(work.batches(data.calibration, user_model=True)))
    known = "the data" if data.labels is None else f"the {len(data.labels)} classes of the data"
    outputs = call(copy.deepcopy(model).eval(), inputs)
    if work.recipe.train is not None:
        try:
            check_loss(loss, task.loss, data.source, outputs, targets)
        except ModelError as error:
            raise ModelError(f"{error}; check model.args and task.loss against {known}") from error
    if work.recipe.train is not None and work.recipe.train.distill is not None:
        try:
            check_distillable(outputs, targets)
        except InputError as error:
            raise RecipeError(f"train.distill: {error}") from error
    if task.metric == AGREEMENT:
        targets = outputs  # those of the float model, which no data set holds
    scores = evaluate(lambda _: outputs, [(inputs, targets)], work.metric)
    if len(data.test) < 2 and scores.statistics.dtype != torch.bool:
        raise DataError(f"found {len(data.test)} test samples, wanted at least 2: {work.metric.name} has no interval")


def _labelled_by(work: Run, model: nn.Module) -> Samples:
    """The test split with what the float model computes from it as its targets, in the model's own structure."""
    with torch.no_grad():
        outputs = [call(model, inputs) for inputs in work.batches(work.data.test).inputs()]
    targets: Any = pytree.tree_map(lambda *parts: torch.cat(parts), *outputs)
    return work.data.test.labelled(targets)
