"""The stages of a run that train and calibrate; each is checkpointed, and taken from its checkpoint when it is done.

A stage depends on the recipe and on the float weights alone, never on what ran before it in the process: each
training seeds its own generators. So a resumed run ends with the bits of an uninterrupted one.
"""

from __future__ import annotations

import copy
import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import nn

from edgeqat.data.fingerprint import fingerprint
from edgeqat.errors import CheckpointError
from edgeqat.factory import build_aids, build_fusions, build_mapping, build_twin_aids
from edgeqat.graph.patterns import patterns_of
from edgeqat.grid_rules import GridRules
from edgeqat.measuring.variant import Variant
from edgeqat.planning import Plan
from edgeqat.ptq_stage import quantize_after_training
from edgeqat.qconfig_mapping import QConfigMapping
from edgeqat.recipe import Recipe
from edgeqat.recipe_train import TrainSection
from edgeqat.reporting.monitor import Followed
from edgeqat.reporting.network_schema import EpochRow, StageRow
from edgeqat.run_context import Run
from edgeqat.simulate.build import prepare
from edgeqat.simulate.freeze import convert
from edgeqat.simulate.model import SimulatedModel
from edgeqat.stage_fit import fit_stage
from edgeqat.train.aids import QatAids
from edgeqat.train.batch_norm import BatchNormSchedule
from edgeqat.train.calibrate import calibrate
from edgeqat.train.checkpoint import load_weights, put_weights, weights_of
from edgeqat.train.progressive import carry_weights
from edgeqat.train.store import CheckpointStore, RunIdentity

__all__ = [
    "Stage",
    "adopt_twin",
    "curves",
    "open_store",
    "plan_hash",
    "prepared",
    "stages_of",
    "train_and_convert",
    "train_float",
]

FINE_TUNE_GRAD_NORM = 1.0
"""Bound of the gradient norm in fine-tuning, for QAT and its float twin alike."""


def open_store(work: Run, planned: Plan) -> CheckpointStore:
    """The checkpoints of a run."""
    recipe = work.recipe
    identity = RunIdentity(recipe.identity(), recipe.sha256(), plan_hash(planned), fingerprint(work.data))
    with work.team.ranks.alike():
        if len(set(work.team.ranks.of_each((identity.data_sha256, identity.plan_hash)))) > 1:
            raise CheckpointError("the processes have different data or models, wanted the same; give all of them one")
    folder, better = work.folder / "checkpoints", work.metric.higher_is_better
    return CheckpointStore(folder, identity, better, work.monitor.line, work.team.ranks)


def plan_hash(planned: Plan) -> str:
    """The plan's hash; with what targets of one's own want of its grids, for their files may have been changed."""
    own, rules = planned.program.plan_hash, planned.grid_rules
    return own if rules == GridRules() else hashlib.sha256(f"{own} {rules}".encode()).hexdigest()


@dataclass(frozen=True)
class Stage:
    """A stage of fine-tuning: the name of its checkpoints, its epochs, and the fewest bits that it has."""

    name: str
    epochs: int
    weights: int = 2
    activations: int = 2

    def mapping(self, recipe: Recipe) -> QConfigMapping:
        """The recipe's mapping at no fewer bits than the stage's."""
        return build_mapping(recipe.quantize).at_least(self.weights, self.activations)


def stages_of(train: TrainSection, variant: str) -> list[Stage]:
    """The stages of a variant's fine-tuning; the last has the variant's own name, and the recipe's own bits."""
    told = enumerate(train.progressive, start=1)
    wide = [Stage(f"{variant}-stage{i}", s.epochs, s.weights or 2, s.activations or 2) for i, s in told]
    return [*wide, Stage(variant, train.qat_epochs)]


def curves(store: CheckpointStore, train: TrainSection | None) -> list[StageRow]:
    """The epochs of every stage that was trained in this run, as its checkpoints tell them."""
    variants = () if train is None else (stages_of(train, "float_finetuned"), stages_of(train, "qat"))
    names = ["float", *(stage.name for stages in variants for stage in stages)]
    found = {name: store.history(name) for name in names}
    return [
        StageRow(stage=name, epochs=[EpochRow(**asdict(epoch)) for epoch in epochs])
        for name, epochs in found.items()
        if epochs
    ]


def train_float(work: Run, model: nn.Module, store: CheckpointStore) -> None:
    """Gives `model` the weights that the float stage ends with, and leaves it in eval mode."""
    train = work.recipe.train
    epochs = 0 if train is None else train.float_epochs
    if not _done(work, store, "float", model):
        if train is not None and epochs > 0:
            work.monitor.stage(f"train the float model, {epochs} epochs")
            fit_stage(work, store, "float", model, epochs, train.float_lr)
        store.save_final("float", model, epochs)
    model.eval()


def adopt_twin(work: Run, store: CheckpointStore, model: nn.Module, weights: Path) -> None:
    """Takes the fine-tuned float twin from another run, whose training of the same float model was the same."""
    twin, train = copy.deepcopy(model), work.recipe.train
    if train is not None and not store.load_final("float_finetuned", twin):
        load_weights(twin, weights)
        store.save_final("float_finetuned", twin, train.qat_epochs)


def train_and_convert(work: Run, model: nn.Module, store: CheckpointStore) -> list[Variant]:
    """Float, PTQ and, where the recipe trains, the fine-tuned float twin and QAT."""
    train = work.recipe.train
    train_float(work, model, store)
    variants = [_float_variant(work, "float", model)]

    ptq = prepared(work, model, build_mapping(work.recipe.quantize))
    if not _done(work, store, "ptq", ptq):
        work.monitor.stage("quantize after training (ptq)")
        quantize_after_training(work, ptq)
        store.save_final("ptq", ptq, 0)
    variants.append(Variant("ptq", ptq.eval(), convert(ptq)))
    if train is None:
        return variants

    twin = copy.deepcopy(model)
    _fine_tune_twin(work, store, train, twin)
    variants.append(_float_variant(work, "float_finetuned", twin))

    teacher = variants[-1].model  # takes what the quantized ones take
    qat = _train_quantized(work, store, train, model, ptq, build_aids(train, teacher))
    variants.append(Variant("qat", qat.eval(), convert(qat)))
    return variants


def _fine_tune_twin(work: Run, store: CheckpointStore, train: TrainSection, twin: nn.Module) -> None:
    """Trains the float twin with the budget of QAT, in as many stages."""
    if _done(work, store, "float_finetuned", twin):
        return
    for stage in stages_of(train, "float_finetuned"):
        if stage.name != "float_finetuned" and _done(work, store, stage.name, twin):
            continue
        work.monitor.stage(f"fine-tune the float twin, {stage.epochs} epochs")
        aids = build_twin_aids(train)
        fit_stage(work, store, stage.name, twin, stage.epochs, train.qat_lr, FINE_TUNE_GRAD_NORM, aids=aids)
        store.save_final(stage.name, twin, stage.epochs)


def _train_quantized(
    work: Run, store: CheckpointStore, train: TrainSection, model: nn.Module, ptq: SimulatedModel, aids: QatAids
) -> SimulatedModel:
    """Trains at the recipe's bits, after the stages of more.

    It starts from what ptq ended with, its rounding included; stages of more bits from the float weights, which
    were rounded to fewer.
    """
    *wide, last = stages_of(train, "qat")
    qat = prepared(work, model, last.mapping(work.recipe))
    if _done(work, store, last.name, qat):
        return qat
    before: SimulatedModel | None = None
    norms = _batch_norm_schedule(work.recipe)
    for stage in [*wide, last]:
        sim = qat if stage is last else prepared(work, model, stage.mapping(work.recipe))
        if before is not None:
            carry_weights(before, sim)
        if stage is last or not _done(work, store, stage.name, sim):
            work.monitor.stage(f"quantization-aware training, {stage.epochs} epochs{_at_least(stage)}")
            # A checkpoint brings its own weights and grids; starting again costs little and needs no second way in.
            if wide:
                calibrate(sim, Followed(work.monitor, "calibration", work.dealt(work.data.calibration).inputs()))
            else:
                put_weights(sim, weights_of(ptq), "ptq")
                sim.set_phase("quantized")
            fit_stage(work, store, stage.name, sim, stage.epochs, train.qat_lr, FINE_TUNE_GRAD_NORM, norms, aids)
            store.save_final(stage.name, sim, stage.epochs)
        before = sim
    return qat


def _at_least(stage: Stage) -> str:
    told = [f"{bits}-bit {what}" for what, bits in (("weights", stage.weights), ("activations", stage.activations))]
    wide = [text for text in told if not text.startswith("2-")]
    return f", {' and '.join(wide)} or more" if wide else ""


def _done(work: Run, store: CheckpointStore, stage: str, model: nn.Module) -> bool:
    """Loads what a stage ended with, if it did."""
    done = store.load_final(stage, model)
    if done:
        work.monitor.stage(f"{stage}: done before, taken from its checkpoint")
    return done


def prepared(work: Run, model: nn.Module, mapping: QConfigMapping) -> SimulatedModel:
    """The simulation of a float model under a mapping, as the recipe wants it, not yet calibrated."""
    quantize = work.recipe.quantize
    mode = quantize.in_training
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
