"""What a recipe names by string: models, losses, quantization settings."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from edgeqat.callables import USER_ERRORS, resolve_callable, resolve_object
from edgeqat.errors import InputError, ModelError, RecipeError
from edgeqat.graph.patterns import Fusion, FusionPattern
from edgeqat.metrics import Metric, resolve_metric
from edgeqat.named_models import named_model
from edgeqat.qconfig import ActivationConfig, QConfig, WeightConfig
from edgeqat.qconfig_mapping import QConfigMapping
from edgeqat.recipe import ModelSection
from edgeqat.recipe_quantize import ActivationsSection, Override, QuantizeSection, WeightsSection
from edgeqat.recipe_train import AnnealedSection, TrainSection
from edgeqat.train.aids import QatAids
from edgeqat.train.checkpoint import load_weights
from edgeqat.train.distillation import Distillation
from edgeqat.train.ema import Ema
from edgeqat.train.losses import Loss, resolve_loss
from edgeqat.train.oscillation import Annealed, Oscillation

__all__ = [
    "build_aids",
    "build_fusions",
    "build_loss",
    "build_mapping",
    "build_metric",
    "build_model",
    "build_twin_aids",
    "check_not_random",
]


def build_model(section: ModelSection, seed: int) -> nn.Module:
    """The float model of a recipe, with its weights where it names some.

    Raises:
        ModelError: The factory cannot be imported, fails or returns no module, or the weights do not fit.
    """
    model = _made(section, seed, keep=True)
    if section.weights is not None:
        load_weights(model, Path(section.weights))
    return model


def _made(section: ModelSection, seed: int, keep: bool) -> nn.Module:
    """What the factory returns; `keep`: see `resolve_callable`."""
    factory = named_model(section.factory) or resolve_callable(section.factory, "model.factory", keep=keep)
    torch.manual_seed(seed)
    try:
        model = factory(**section.args)
    except ModelError:
        raise
    except USER_ERRORS as error:
        raise ModelError(
            f"model.factory {section.factory} failed with model.args {section.args}: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"model.factory {section.factory} returned a {type(model).__name__}, wanted an nn.Module")
    return model


def check_not_random(section: ModelSection, seed: int) -> None:
    """Refuses a model that nobody trained: without a file of weights its factory must load some by itself.

    What is loaded is the same whatever the seed is, what is initialised is not; a factory that seeds itself passes.

    Raises:
        ModelError: Parameters are random.
    """
    if section.weights is not None:
        return
    first, second = (dict(_made(section, s, keep=False).named_parameters()) for s in (seed, seed ^ 1))
    random = [name for name, found in first.items() if name not in second or not torch.equal(found, second[name])]
    if random:
        raise ModelError(
            f"model.weights is null and nothing is trained, so {section.factory} has random weights "
            f"({len(random)} of its {len(first)} parameters change with the seed, such as {random[0]}); "
            "set model.weights to a trained state_dict, or train it with train.float_epochs"
        )


def build_loss(name: str) -> Loss:
    """The loss that a recipe names: a built-in name or a callable.

    Raises:
        RecipeError: The name is unknown.
    """
    if ":" in name:
        return resolve_callable(name, "task.loss")
    try:
        return resolve_loss(name)
    except InputError as error:
        raise RecipeError(f"task.loss: {error}, or module:callable") from error


def build_metric(name: str) -> Metric:
    """The metric that a recipe names: a built-in name or a callable.

    Raises:
        RecipeError: The name is unknown, or the callable does not say which way is better.
        ModelError: The callable cannot be imported.
    """
    try:
        return resolve_metric(name)
    except ModelError:
        raise  # it names the key already
    except InputError as error:
        raise RecipeError(f"task.metric: {error}") from error


def build_aids(section: TrainSection, teacher: nn.Module) -> QatAids:
    """What helps the quantization-aware training of a recipe; the teacher counts where it distils."""
    distillation, oscillation = None, None
    if section.distill is not None:
        distillation = Distillation(teacher, section.distill.weight, section.distill.temperature)
    if section.oscillation is not None:
        own = section.oscillation
        freeze, dampen = _annealed(own.freeze), _annealed(own.dampen)
        oscillation = Oscillation(own.momentum, own.max_bits, freeze, dampen)
    return QatAids(distillation, oscillation, _ema(section))


def build_twin_aids(section: TrainSection) -> QatAids:
    """What the float twin's fine-tuning gets of that: moving averages, so that QAT is not credited with their gain."""
    return QatAids(ema=_ema(section))


def _ema(section: TrainSection) -> Ema | None:
    return None if section.ema is None else Ema(section.ema.decay, section.ema.reestimate_batches)


def _annealed(section: AnnealedSection | None) -> Annealed | None:
    return None if section is None else Annealed(section.first, section.last, section.begin, section.shape)


def build_fusions(section: QuantizeSection) -> list[Fusion]:
    """The fusions of a recipe: lists of module names as they are, and the FusionPatterns that it names.

    Raises:
        ModelError: The module of a pattern cannot be imported.
        RecipeError: What is named is no FusionPattern.
    """
    fusions: list[Fusion] = []
    for fusion in section.fusions:
        if isinstance(fusion, str):
            found = resolve_object(fusion, "quantize.fusions", "pattern")
            if not isinstance(found, FusionPattern):
                kind = "nothing" if found is None else type(found).__name__
                raise RecipeError(f"quantize.fusions: found {kind} as {fusion}, wanted a FusionPattern")
            fusions.append(found)
        else:
            fusions.append(fusion)
    return fusions


def build_mapping(section: QuantizeSection) -> QConfigMapping:
    """The QConfigMapping of a recipe's quantize section."""
    base = QConfig(
        _activation(section.activations),
        _weight(section.weights),
        None if section.output is None else _activation(section.output),
    )
    mapping = QConfigMapping().set_global(base)
    if section.first_last is not None:
        ends = section.first_last
        mapping.set_first_last(QConfig(_activation(ends.activations), _weight(ends.weights)))
    for override in section.overrides:
        qconfig = _override(override, base)
        if override.module is not None:
            mapping.set_module_name(override.module, qconfig)
        elif override.regex is not None and override.type is not None and override.index is not None:
            mapping.set_module_name_object_type_order(override.regex, override.type, override.index, qconfig)
        elif override.regex is not None:
            mapping.set_module_name_regex(override.regex, qconfig)
        elif override.type is not None:
            mapping.set_object_type(override.type, qconfig)
    return mapping


def _override(override: Override, base: QConfig) -> QConfig | None:
    if not override.quantize:
        return None
    return QConfig(
        base.activation if override.activations is None else _activation(override.activations),
        base.weight if override.weights is None else _weight(override.weights),
        base.output if override.output is None else _activation(override.output),
    )


def _activation(section: ActivationsSection) -> ActivationConfig:
    return ActivationConfig(**section.model_dump())


def _weight(section: WeightsSection) -> WeightConfig:
    return WeightConfig(**section.model_dump())
