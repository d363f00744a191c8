"""The sensitivity analysis of a recipe: float weights as a run of it trains them, calibrated, layer by layer.

    load -> float weights, from the run's checkpoint or trained -> prepare, calibrate -> sensitivity.json, .svg

It shares a run's directory and checkpoints: what it trains, the run need not train again, and the other way round.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from edgeqat.data.batches import Batches
from edgeqat.data.dataset import Dataset, Split
from edgeqat.diagnose.jobs import Jobs
from edgeqat.diagnose.sensitivity import Settings, sensitivity
from edgeqat.diagnose.sensitivity_table import Sensitivity
from edgeqat.factory import build_fusions, build_mapping
from edgeqat.files import to_json, write_atomically
from edgeqat.pipeline import begin, check_same, check_task
from edgeqat.processes import check_alone
from edgeqat.ptq_stage import quantize_after_training
from edgeqat.recipe import Recipe
from edgeqat.reporting.figures.sensitivity import sensitivity_svg
from edgeqat.reporting.monitor import Monitor, Silent
from edgeqat.reporting.page import render_page
from edgeqat.reporting.schema import read_report
from edgeqat.run_context import AGREEMENT, Run
from edgeqat.run_folder import FolderState, check_free, claimed
from edgeqat.simulate.build import prepare
from edgeqat.simulate.model import SimulatedModel
from edgeqat.tracking import tracked
from edgeqat.training_stages import open_store, prepared, train_float
from edgeqat.version import __version__

__all__ = ["SAMPLES", "analyse"]

LOG = "sensitivity.jsonl"

SAMPLES = 512
"""The standard error of a share is then at most 2.2 points, that of a drop, on pairs, far less."""


def analyse(recipe: Recipe, out_dir: str | Path, n: int = SAMPLES, monitor: Monitor | None = None) -> Sensitivity:
    """Measures what each layer of a recipe's calibrated model costs, and writes it beside the run.

    Float weights come from the run that `out_dir` holds. Where it does not have them yet they are trained as the
    recipe says, and kept as the run's own: `run` with `resume` goes on from there.

    Args:
        recipe: The recipe.
        out_dir: Gets `sensitivity.json`, `sensitivity.svg`, and `sensitivity.jsonl`: what each batch shows, which is
            not measured again.
        n: Samples at most: the first of the validation split, then of the calibration split. Never the test split.
        monitor: Told of progress.

    Raises:
        InputError: The recipe, its data, model or settings, or `out_dir` cannot be used, or it holds the run of
            another recipe.
        JobError: The system ended a job.
        MissingRuntimeError: Ray is asked for and not installed.
    """
    jobs = Jobs(recipe.compute.jobs, recipe.compute.jobs_on)  # what is not installed is said before data is loaded
    check_alone(recipe.compute, "sensitivity")
    monitor, folder = Silent() if monitor is None else monitor, Path(out_dir)
    held = check_free(folder, resume=True)
    if held is not FolderState.FREE:
        check_same(recipe, folder, "give its settings too, or choose another directory with -o")
    work, model, planned = begin(recipe, folder, monitor)
    check_task(work, model)
    with contextlib.ExitStack() as claim:
        if held is not FolderState.FINISHED:  # a finished run has its float weights, and stays as it is
            claim.enter_context(claimed(folder, resume=True))
            write_atomically(folder / "recipe.yaml", recipe.to_yaml())
            work.tracking = claim.enter_context(tracked(recipe.log, folder))
        train_float(work, model, open_store(work, planned))
        sim = prepared(work, model, build_mapping(recipe.quantize))
        monitor.stage("calibrate")
        quantize_after_training(work, sim)
        split = _samples(work.data, n)
        batches, settings = work.batches(split), Settings(sim)
        monitor.stage(f"sensitivity of {len(settings.units)} layers, parts and values on {len(split)} samples")
        metric = None if split.targets is None or recipe.task.metric == AGREEMENT else work.metric
        classes = None if metric is None else metric.classes or work.data.labels is not None
        if jobs.n > 1:
            monitor.line(str(jobs))
        with monitor.steps("sensitivity", len(settings) * len(batches)) as advance, jobs:
            given = _told(work, batches) if metric is not None else (inputs for inputs, _ in _told(work, batches))
            table = sensitivity(
                sim,
                given,
                metric,
                classes=classes,
                on_run=advance,
                log=folder / LOG,
                jobs=jobs,
                make=_maker(work, model),
            )
        about = {"edgeqat": __version__, "recipe_sha256": recipe.sha256(), "source": recipe.data.source}
        write_atomically(folder / "sensitivity.svg", sensitivity_svg(table))
        write_atomically(folder / "sensitivity.json", to_json({**about, **table.to_dict()}))
        if held is FolderState.FINISHED:  # its page shows the figure; another's is written when it is finished
            write_atomically(folder / "report.html", render_page(read_report(folder), folder))
    return table


def _maker(work: Run, model: nn.Module) -> Callable[[], SimulatedModel]:
    """What makes the simulation in another process, of the model itself: its code may be a file of the user's."""
    quantize = work.recipe.quantize
    return functools.partial(
        prepare,
        model,
        work.example(),
        work.recipe.export,
        build_mapping(quantize),
        build_fusions(quantize),
        batch_norm=quantize.in_training,
        opaque=quantize.opaque,
        pixels=work.pixels,
    )


def _samples(data: Dataset, n: int) -> Split:
    """The first n of validation and calibration, as far as there are so many."""
    parts = [split for split in (data.validation, data.calibration) if len(split)]
    first = [part.take(torch.arange(min(n, len(part)))) for part in parts]
    if len(first) == 1:
        return first[0]

    def joined(*leaves: Any) -> Any:
        return torch.cat(leaves)[:n] if isinstance(leaves[0], Tensor) else leaves[0]

    inputs, targets = pytree.tree_map(joined, *((part.inputs, part.targets) for part in first))
    return Split(inputs, targets)


def _told(work: Run, batches: Batches) -> Iterator[tuple[Any, Any]]:
    """The batches; each is told of, for there may be no terminal for a progress bar."""
    for index, batch in enumerate(batches, start=1):
        work.monitor.line(f"batch {index} of {len(batches)}")
        yield batch
