"""What may be done with a layer, cheapest first, as settings of a recipe's `quantize` section.

For all layers at once: another observer for those without settings of their own, or equalization; that costs nothing
when the model runs. For a layer: another observer, 8 bits instead of fewer, float; and where a file is too large, 4
bits for its weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edgeqat.diagnose.layers import Layer, Layers
from edgeqat.factory import build_mapping
from edgeqat.qconfig import ActivationConfig, QConfig, WeightConfig
from edgeqat.recipe_quantize import ActivationsSection, Override, QuantizeSection, WeightsSection

__all__ = [
    "BASE",
    "FEWER_BITS",
    "FEWER_BITS_N",
    "FLOAT",
    "OBSERVERS",
    "Choice",
    "global_treatments",
    "section_of",
    "treatments_of",
]

FLOAT = "float"
MORE_BITS, MORE_BITS_N = "8 bits", 8
FEWER_BITS, FEWER_BITS_N = "4-bit weights", 4
OBSERVERS = ("mse", "percentile")
"""Treatments that have the name of the observer which they put in the place of the present one."""

EQUALIZE = "equalize"


@dataclass(frozen=True)
class Choice:
    """What is done with a model.

    Attributes:
        globally: Global treatments, in the order in which they were chosen.
        layers: Layers and their treatments, sorted by name; those that are left as they are do not occur.
    """

    globally: tuple[str, ...] = ()
    layers: tuple[tuple[str, str], ...] = ()

    def treating(self, treatments: Mapping[str, str | None]) -> Choice:
        """This choice with other treatments for some layers; None for none."""
        merged = {**dict(self.layers), **treatments}
        return Choice(self.globally, tuple(sorted((name, t) for name, t in merged.items() if t is not None)))

    def describe(self) -> str:
        """`mse; conv1 float, fc 8 bits`; "as it is" for nothing."""
        layers = ", ".join(f"{name} {treatment}" for name, treatment in self.layers)
        return "; ".join([*self.globally, *([layers] if layers else [])]) or "as it is"


BASE = Choice()
"""The recipe as it is."""


def global_treatments(base: QuantizeSection) -> tuple[tuple[str, ...], ...]:
    """Those that change something of a section, in groups of which one at most is chosen."""
    equalize = (EQUALIZE,) if base.batch_norm == "fold" else ()
    groups = (OBSERVERS, equalize)
    return tuple(tuple(name for name in group if _globally(base, name) != base) for group in groups)


def treatments_of(base: QuantizeSection, layers: Layers, name: str, globally: tuple[str, ...] = ()) -> tuple[str, ...]:
    """What may be done with a layer that loses too much, cheapest first; the last is float. Nothing where it is."""
    own, layer = _settings(_with_globals(base, globally), layers, name), layers.by_name[name]
    if not own.quantize:
        return ()
    return tuple(t for t in (*OBSERVERS, MORE_BITS, FLOAT) if _treated(own, t, layer) != own)


def section_of(base: QuantizeSection, layers: Layers, choice: Choice) -> QuantizeSection:
    """The section that a choice makes of `base`; the overrides of the choice come first, and so win over its own."""
    section = _with_globals(base, choice.globally)
    made = []
    for name, treatment in choice.layers:
        made.append(_treated(_settings(section, layers, name), treatment, layers.by_name[name]))
    taken = [override.selector for override in made]
    kept = [override for override in section.overrides if override.selector not in taken]
    return section.model_copy(update={"overrides": [*made, *kept]})


def _with_globals(base: QuantizeSection, globally: tuple[str, ...]) -> QuantizeSection:
    for name in globally:
        base = _globally(base, name)
    return base


def _globally(base: QuantizeSection, name: str) -> QuantizeSection:
    if name == EQUALIZE:
        return base.model_copy(update={"ptq": base.ptq.model_copy(update={"equalize": True})})
    parts = {"weights": base.weights, "activations": base.activations, "output": base.output}
    return base.model_copy(update={key: _observing(part, name) for key, part in parts.items() if part is not None})


def _settings(section: QuantizeSection, layers: Layers, name: str) -> Override:
    """The settings that a layer has by a section, as an override that changes nothing."""
    qconfig = layers.qconfig_of(name, build_mapping(section))
    return override_of(layers.by_name[name].selector, qconfig)


def override_of(selector: Mapping[str, str | int], qconfig: QConfig | None) -> Override:
    """A QConfig whose observers have names, as a recipe's override."""
    if qconfig is None:
        return Override.model_validate({**selector, "quantize": False})
    settings = {
        "weights": WeightsSection(**_fields(qconfig.weight)),
        "activations": ActivationsSection(**_fields(qconfig.activation)),
        "output": None if qconfig.output is None else ActivationsSection(**_fields(qconfig.output)),
    }
    return Override.model_validate({**selector, **settings})


def _fields(config: ActivationConfig | WeightConfig) -> dict[str, Any]:
    return {**vars(config), "observer_args": config.arguments}


def _treated(own: Override, treatment: str, layer: Layer) -> Override:
    """An override after a treatment; `own` itself where that changes nothing."""
    if treatment == FLOAT:
        return Override.model_validate({**own.selector, "quantize": False})
    parts = {"weights": own.weights, "activations": own.activations, "output": own.output}
    given = {key: part for key, part in parts.items() if part is not None and (key != "weights" or layer.weights)}
    if treatment in OBSERVERS:
        return own.model_copy(update={key: _observing(part, treatment) for key, part in given.items()})
    if treatment == MORE_BITS:
        return own.model_copy(
            update={key: part.model_copy(update={"bits": MORE_BITS_N}) for key, part in given.items()}
        )
    assert treatment == FEWER_BITS and own.weights is not None
    # With 15 integers the largest weight is too wide a range for all others.
    weights = _observing(own.weights, "mse").model_copy(update={"bits": FEWER_BITS_N, "per_channel": True})
    return own.model_copy(update={"weights": weights})


def _observing(part: WeightsSection | ActivationsSection, observer: str) -> WeightsSection | ActivationsSection:
    if part.observer == observer and not part.observer_args:
        return part
    return part.model_copy(update={"observer": observer, "observer_args": {}})
