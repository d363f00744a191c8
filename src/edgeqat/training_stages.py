"""The stages of a run that train and calibrate; each is checkpointed, and taken from its checkpoint when it is done.

A stage depends on the recipe and on the float weights alone, never on what ran before it in the process: each
training seeds its own generators. So a resumed run ends with the bits of an uninterrupted one.
"""

from __future__ import annotations

import copy
import hashlib

from torch import nn

from edgeqat.data.fingerprint import fingerprint
from edgeqat.errors import DataError, TrainingError
from edgeqat.factory import build_fusions, build_loss, build_mapping
from edgeqat.graph.patterns import patterns_of
from edgeqat.grid_rules import GridRules
from edgeqat.machine import arithmetic_here
from edgeqat.measuring.variant import Variant
from edgeqat.planning import Plan
from edgeqat.ptq_stage import quantize_after_training
from edgeqat.qconfig_mapping import QConfigMapping
from edgeqat.recipe import Recipe
from edgeqat.reporting.summary import figure
from edgeqat.run_context import Run
from edgeqat.simulate.build import prepare
from edgeqat.simulate.freeze import convert
from edgeqat.simulate.model import SimulatedModel
from edgeqat.target_rules import resolve_targets
from edgeqat.train.batch_norm import ALWAYS_LIVE, BatchNormSchedule
from edgeqat.train.checkpoint import put_weights, weights_of
from edgeqat.train.loop import Epoch, fit
from edgeqat.train.store import CheckpointStore, RunIdentity

__all__ = ["open_store", "plan_hash", "prepared", "train_and_convert", "train_float"]

FINE_TUNE_GRAD_NORM = 1.0
"""Bound of the gradient norm in fine-tuning, for QAT and its float twin alike."""


def open_store(work: Run, planned: Plan) -> CheckpointStore:
    """The checkpoints of a run."""
    recipe = work.recipe
    identity = RunIdentity(recipe.model_dump(mode="json"), recipe.sha256(), plan_hash(planned), fingerprint(work.data))
    return CheckpointStore(work.folder / "checkpoints", identity, work.metric.higher_is_better, work.monitor.line)


def plan_hash(planned: Plan) -> str:
    """The plan's hash; with what targets of one's own want of its grids, for their files may have been changed."""
    own, rules = planned.program.plan_hash, planned.grid_rules
    return own if rules == GridRules() else hashlib.sha256(f"{own} {rules}".encode()).hexdigest()


def train_float(work: Run, model: nn.Module, store: CheckpointStore) -> None:
    """Gives `model` the weights that the float stage ends with, and leaves it in eval mode."""
    train = work.recipe.train
    epochs = 0 if train is None else train.float_epochs
    if not _done(work, store, "float", model):
        if train is not None and epochs > 0:
            work.monitor.stage(f"train the float model, {epochs} epochs")
            _fit(work, store, "float", model, epochs, train.float_lr)
        store.save_final("float", model, epochs)
    model.eval()


def train_and_convert(work: Run, model: nn.Module, store: CheckpointStore) -> list[Variant]:
    """Float, PTQ and, where the recipe trains, the fine-tuned float twin and QAT."""
    train = work.recipe.train
    train_float(work, model, store)
    variants = [_float_variant(work, "float", model)]

    ptq = prepared(work, model)
    if not _done(work, store, "ptq", ptq):
        work.monitor.stage("quantize after training (ptq)")
        quantize_after_training(work, ptq)
        store.save_final("ptq", ptq, 0)
    variants.append(Variant("ptq", ptq.eval(), convert(ptq)))
    if train is None:
        return variants

    twin = copy.deepcopy(model)
    if not _done(work, store, "float_finetuned", twin):
        work.monitor.stage(f"fine-tune the float twin, {train.qat_epochs} epochs")
        _fit(work, store, "float_finetuned", twin, train.qat_epochs, train.qat_lr, FINE_TUNE_GRAD_NORM)
        store.save_final("float_finetuned", twin, train.qat_epochs)
    variants.append(_float_variant(work, "float_finetuned", twin))

    qat = prepared(work, model)
    if not _done(work, store, "qat", qat):
        work.monitor.stage(f"quantization-aware training, {train.qat_epochs} epochs")
        # It starts from what ptq ended with, its rounding included; a checkpoint brings weights and grids of its own.
        put_weights(qat, weights_of(ptq), "ptq")
        qat.set_phase("quantized")
        norms = _batch_norm_schedule(work.recipe)
        _fit(work, store, "qat", qat, train.qat_epochs, train.qat_lr, FINE_TUNE_GRAD_NORM, norms)
        store.save_final("qat", qat, train.qat_epochs)
    variants.append(Variant("qat", qat.eval(), convert(qat)))
    return variants


def _done(work: Run, store: CheckpointStore, stage: str, model: nn.Module) -> bool:
    """Loads what a stage ended with, if it did."""
    done = store.load_final(stage, model)
    if done:
        work.monitor.stage(f"{stage}: done before, taken from its checkpoint")
    return done


def prepared(work: Run, model: nn.Module) -> SimulatedModel:
    """The simulation of a float model as the recipe wants it, not yet calibrated."""
    quantize = work.recipe.quantize
    mapping, mode = build_mapping(quantize), quantize.in_training
    fusions, opaque = build_fusions(quantize), quantize.opaque
    return prepare(
        model,
        work.example(),
        work.recipe.export,
        mapping,
        fusions,
        batch_norm=mode,
        opaque=opaque,
        pixels=work.pixels,
    )


def _batch_norm_schedule(recipe: Recipe) -> BatchNormSchedule:
    """What QAT does with live batch norms: "frozen" without a number of epochs means from the first step."""
    assert recipe.train is not None
    freeze_after = recipe.train.freeze_batch_norm_after
    if recipe.quantize.batch_norm == "frozen" and freeze_after is None:
        freeze_after = 0
    return BatchNormSchedule(freeze_after, recipe.train.reestimate_batches)


def _float_variant(work: Run, name: str, model: nn.Module) -> Variant:
    """A float model as a program of one float island, so that it is lowered and measured like any other.

    Its file takes what the quantized ones take: pixels are normalised in float at its head.
    """
    model = copy.deepcopy(model).eval()
    # What replaces blocks makes the float model faster too, and the comparison is with the best float model.
    replacing = [p for p in patterns_of(build_fusions(work.recipe.quantize)) if p.replace is not None]
    everything, opaque = QConfigMapping().set_global(None), work.recipe.quantize.opaque
    export, pixels = work.recipe.export, work.pixels
    island = prepare(model, work.example(), export, everything, replacing, opaque=opaque, pixels=pixels)
    return Variant(name, model if pixels is None else island.eval(), convert(island))


def _fit(
    work: Run,
    store: CheckpointStore,
    stage: str,
    model: nn.Module,
    epochs: int,
    lr: float,
    max_grad_norm: float | None = None,
    batch_norm: BatchNormSchedule = ALWAYS_LIVE,
) -> None:
    """Trains a stage to its end, from its last whole epoch where there is one.

    Raises:
        DataError, TrainingError: See `fit`; the message names the last good checkpoint.
    """
    train = work.recipe.train
    assert train is not None
    user_model = not isinstance(model, SimulatedModel)
    batches = work.batches(work.data.train, train=True, user_model=user_model)
    start = store.latest(stage)
    done = 0 if start is None else len(start.history)
    if done:
        work.monitor.line(f"resumed after epoch {done}/{epochs}")

    def tell(epoch: Epoch) -> None:
        metric = ""
        if epoch.metric is not None:
            metric = f", validation {work.metric.name} {figure(epoch.metric, work.metric.is_share)}"
        work.monitor.line(f"epoch {epoch.index}/{epochs}: loss {epoch.loss:.4f}{metric} ({epoch.seconds:.1f} s)")

    target = resolve_targets(work.recipe.export)[0]
    try:
        with work.monitor.steps("training", (epochs - done) * len(batches)) as advance:
            fit(
                model,
                batches,
                epochs=epochs,
                lr=lr,
                optimizer=train.optimizer,
                momentum=train.momentum,
                weight_decay=train.weight_decay,
                loss=build_loss(work.recipe.task.loss),
                max_grad_norm=max_grad_norm,
                batch_norm=batch_norm,
                seed=train.seed,
                validation_batches=work.batches(work.data.validation, user_model=user_model),
                metric=work.metric,
                # What will be shipped is validated; where its arithmetic is not known, the simulation is.
                exact=arithmetic_here(target.name if target.file is None else target.runtime),
                on_step=advance,
                on_epoch=tell,
                start=start,
                on_checkpoint=lambda state: store.save_epoch(stage, state),
            )
    except (DataError, TrainingError) as error:
        kept = store.last_good(stage)
        where = "there is no checkpoint yet" if kept is None else f"the last good checkpoint is {kept}"
        raise type(error)(f"{error} (stage {stage}; {where})") from error
