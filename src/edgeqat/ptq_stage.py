"""The stage of a run that quantizes without training: calibration, and the aids that the recipe asks for.

What each aid changed is written beside the checkpoints, so that the report of a resumed run has it too.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor
from torch.utils import _pytree as pytree

from edgeqat.errors import CheckpointError
from edgeqat.files import to_json, write_atomically
from edgeqat.metrics import evaluate
from edgeqat.ptq.adaround import AdaRoundConfig, RoundedLayer, adaround
from edgeqat.ptq.correct_bias import correct_biases
from edgeqat.ptq.equalize import equalize
from edgeqat.ptq.walk import evaluating
from edgeqat.reporting.monitor import Advance, Followed, Monitor
from edgeqat.reporting.schema import AidRow, AidScore
from edgeqat.run_context import AGREEMENT, Run
from edgeqat.simulate.model import SimulatedModel
from edgeqat.train.calibrate import calibrate

__all__ = ["quantize_after_training", "read_aids"]

SCORED = 1000
"""Samples that an aid is judged on, at most."""

ROWS = TypeAdapter(list[AidRow])


def quantize_after_training(work: Run, sim: SimulatedModel) -> None:
    """Calibrates a prepared simulation and applies the aids of the recipe, in place.

    Several processes share the calibration samples. With aids each takes all of them, and what the first one ends with
    is everyone's.
    """
    aids = work.recipe.quantize.ptq
    if aids.chosen:
        _apply_aids(work, sim)
        work.team.ranks.copy_first(list(sim.state_dict().values()))
    else:
        calibrate(sim, Followed(work.monitor, "calibration", work.dealt(work.data.calibration).inputs()))


def _apply_aids(work: Run, sim: SimulatedModel) -> None:
    aids, calibration = work.recipe.quantize.ptq, work.batches(work.data.calibration).inputs()
    judge, rows = _Judge(work, sim), []
    if aids.equalize:
        judge.look(calibrate(copy.deepcopy(sim), Followed(work.monitor, "calibration", calibration)))
        pairs = equalize(sim).pairs
        calibrate(sim, Followed(work.monitor, "calibration", calibration))
        rows.append(judge.row("equalize", sim, f"{len(pairs)} pairs of layers"))
    else:
        judge.look(calibrate(sim, Followed(work.monitor, "calibration", calibration)))
    twin = copy.deepcopy(sim)
    if aids.adaround is not None:
        config = AdaRoundConfig(**aids.adaround.model_dump(), seed=_seed(work))
        with work.monitor.steps("AdaRound", len(sim.parameters_of)) as advance:
            rounded = adaround(sim, calibration, config, on_layer=_telling(advance, work.monitor)).layers
        moved = sum(layer.moved > 0 for layer in rounded)
        rows.append(judge.row("adaround", sim, f"{moved} of {len(rounded)} layers"))
    if aids.correct_bias:
        corrected = correct_biases(sim, calibration, twin).layers
        for layer in corrected:
            work.monitor.detail(f"{layer.name}: bias moved by {layer.rms_shift:.3g} (rms)")
        rows.append(judge.row("correct_bias", sim, f"{len(corrected)} layers"))
    with work.team.ranks.together():
        if work.team.ranks.first:
            write_atomically(_path(work.folder), to_json(ROWS.dump_python(rows, mode="json")))


def read_aids(folder: Path) -> list[AidRow]:
    """What the aids of the run in `folder` changed; none where it has none.

    Raises:
        CheckpointError: The file cannot be read.
    """
    path = _path(folder)
    if not path.is_file():
        return []
    try:
        return ROWS.validate_python(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, ValidationError) as error:
        raise CheckpointError(f"{path} cannot be read; restore it, or start afresh with --overwrite") from error


def _path(folder: Path) -> Path:
    return folder / "checkpoints" / "ptq-aids.json"


def _seed(work: Run) -> int:
    return 0 if work.recipe.train is None else work.recipe.train.seed


def _telling(advance: Advance, monitor: Monitor) -> Callable[[RoundedLayer], None]:
    def tell(layer: RoundedLayer) -> None:
        monitor.detail(f"{layer.name}: {layer.moved:.1%} of its weights rounded the other way")
        advance(layer.name)

    return tell


class _Judge:
    """Scores a simulation as it changes: validation samples where there are labels, else calibration samples."""

    def __init__(self, work: Run, sim: SimulatedModel) -> None:
        self._metric, self._monitor = work.metric, work.monitor
        self._split: Literal["validation", "calibration"] = "validation"
        split = work.data.validation
        if len(split) == 0:
            self._split, split = "calibration", work.data.calibration
        self._n = min(SCORED, len(split))
        self._labelled = self._split == "validation" and work.recipe.task.metric != AGREEMENT
        self._batches = work.batches(split.take(torch.arange(self._n)))
        self._wanted = [_leaves(outputs) for outputs, _ in self._run(sim)]
        self._last = AidScore(metric=None, sqnr_db=None)

    def look(self, sim: SimulatedModel) -> None:
        """Takes what `sim` scores for the state before the first aid."""
        self._last = self._score(sim)

    def row(self, aid: Literal["equalize", "adaround", "correct_bias"], sim: SimulatedModel, changed: str) -> AidRow:
        """What an aid did to `sim`, by the score before it and the one now."""
        before, self._last = self._last, self._score(sim)
        self._monitor.line(f"{aid}: {changed}, SQNR {_decibels(before)} before and {_decibels(self._last)} after")
        return AidRow(aid=aid, split=self._split, n=self._n, before=before, after=self._last, changed=changed)

    def _run(self, sim: SimulatedModel) -> list[tuple[Any, Any]]:
        """(outputs, targets) of each batch."""
        with evaluating(sim):
            return [(sim.call(inputs), targets) for inputs, targets in self._batches]

    def _score(self, sim: SimulatedModel) -> AidScore:
        found = self._run(sim)
        metric = None
        if self._labelled:
            scores = evaluate(lambda outputs: outputs, found, self._metric)
            metric = self._metric.estimate(scores.statistics).value
        signal = noise = 0.0
        for wanted, (outputs, _) in zip(self._wanted, found, strict=True):
            for y, own in zip(wanted, _leaves(outputs), strict=True):
                signal += float(y.square().sum())
                noise += float((y - own).square().sum())
        sqnr = 10 * math.log10(signal / noise) if signal > 0 and noise > 0 else None
        return AidScore(metric=metric, sqnr_db=sqnr)


def _leaves(outputs: Any) -> list[Tensor]:
    """The floating outputs, in float64."""
    leaves = pytree.tree_leaves(outputs)
    return [leaf.double() for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _decibels(score: AidScore) -> str:
    return "without noise" if score.sqnr_db is None else f"{score.sqnr_db:.1f} dB"
