"""The `quantize` section of a recipe: QConfig and QConfigMapping as YAML."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from edgeqat.callables import is_callable_name
from edgeqat.observer_args import ACTIVATION_ARGUMENTS, WEIGHT_ARGUMENTS, wrong_argument
from edgeqat.recipe_numbers import Positive

__all__ = [
    "ActivationsSection",
    "AdaRoundSection",
    "FirstLastSection",
    "Override",
    "PtqSection",
    "QuantizeSection",
    "Section",
    "WeightsSection",
]


class Section(BaseModel):
    """Unknown keys are refused, types are strict, nothing changes after loading."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class WeightsSection(Section):
    """How weights are quantized: edgeqat.WeightConfig."""

    bits: Annotated[int, Field(ge=2, le=8)] = 8
    per_channel: bool = True
    observer: Literal["minmax", "mse", "percentile"] = "minmax"
    learned: bool = False
    observer_args: dict[str, Any] = {}

    @field_validator("observer_args")
    @classmethod
    def _fitting(cls, args: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        return _checked(args, info, WEIGHT_ARGUMENTS)


class ActivationsSection(Section):
    """How activations are quantized: edgeqat.ActivationConfig."""

    bits: Annotated[int, Field(ge=2, le=8)] = 8
    observer: Literal["minmax", "moving_average", "histogram", "percentile", "mse"] = "histogram"
    learned: bool = False
    symmetric: bool = False
    signed: bool = False
    observer_args: dict[str, Any] = {}

    @field_validator("observer_args")
    @classmethod
    def _fitting(cls, args: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        return _checked(args, info, ACTIVATION_ARGUMENTS)


def _checked(args: dict[str, Any], info: ValidationInfo, known: Mapping[str, Any]) -> dict[str, Any]:
    wrong = wrong_argument(info.data["observer"], args, known) if "observer" in info.data else ""
    if wrong:
        raise ValueError(wrong)
    return args


class Override(Section):
    """Other settings for the layers that `module`, `regex` or `type` names, or for one of a type (`index`).

    Settings that are not given are those of the section itself; those that are given are whole.
    """

    module: str | None = None
    regex: str | None = None
    type: str | None = None
    index: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    quantize: bool = True
    weights: WeightsSection | None = None
    activations: ActivationsSection | None = None
    output: ActivationsSection | None = None

    @property
    def selector(self) -> dict[str, str | int]:
        """What says which layers it is for."""
        keys = ("module", "regex", "type", "index")
        return {key: getattr(self, key) for key in keys if getattr(self, key) is not None}

    @model_validator(mode="after")
    def _consistent(self) -> Override:
        given = list(self.selector)
        if given != ["regex", "type", "index"] and (len(given) != 1 or given == ["index"]):
            raise ValueError(
                f"found {given or 'no selector'}, wanted exactly one of module, regex, type, or "
                "all of regex, type, index"
            )
        settings = [key for key in ("weights", "activations", "output") if getattr(self, key) is not None]
        if settings and not self.quantize:
            raise ValueError(f"found quantize: false and {settings[0]}, wanted one of the two")
        return self


class AdaRoundSection(Section):
    """How AdaRound searches: edgeqat.AdaRoundConfig."""

    iterations: Positive = 1000
    positions: Positive = 16
    batch_size: Positive = 256
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.01
    strength: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0


class PtqSection(Section):
    """What is done about the loss of quantization before anything is trained, in this order."""

    equalize: bool = False
    adaround: AdaRoundSection | None = None
    correct_bias: bool = False

    @property
    def chosen(self) -> list[str]:
        """The aids that are on."""
        given = {"equalize": self.equalize, "adaround": self.adaround is not None, "correct_bias": self.correct_bias}
        return [name for name, on in given.items() if on]


class FirstLastSection(Section):
    """The first and last layers with weights, and what they read: edgeqat.QConfigMapping.set_first_last."""

    weights: WeightsSection = WeightsSection()
    activations: ActivationsSection = ActivationsSection()


class QuantizeSection(Section):
    """What is quantized, and how."""

    weights: WeightsSection = WeightsSection()
    activations: ActivationsSection = ActivationsSection()
    output: ActivationsSection | None = None
    first_last: FirstLastSection | None = None
    overrides: list[Override] = []
    batch_norm: Literal["fold", "live", "frozen"] = "fold"
    opaque: list[str] = []
    fusions: list[list[str] | str] = []
    ptq: PtqSection = PtqSection()

    @field_validator("fusions", mode="before")
    @classmethod
    def _lists_and_names(cls, fusions: Any) -> Any:
        for fusion in fusions if isinstance(fusions, list) else ():
            is_list = isinstance(fusion, list) and all(isinstance(name, str) for name in fusion)
            if not is_list and not (isinstance(fusion, str) and is_callable_name(fusion)):
                raise ValueError("each wants to be a list of module names, or module:pattern or file.py:pattern")
        return fusions

    @field_validator("overrides")
    @classmethod
    def _each_once(cls, overrides: list[Override]) -> list[Override]:
        seen: dict[tuple[tuple[str, str | int], ...], int] = {}
        for i, override in enumerate(overrides):
            first = seen.setdefault(tuple(override.selector.items()), i)
            if first != i:
                named = ", ".join(f"{key}: {value}" for key, value in override.selector.items())
                raise ValueError(f"entries {first} and {i} are both for {named}; keep one")
        return overrides

    @model_validator(mode="after")
    def _aids_want_folded(self) -> QuantizeSection:
        if self.ptq.chosen and self.batch_norm != "fold":
            raise ValueError(f"ptq.{self.ptq.chosen[0]} wants quantize.batch_norm: fold, found {self.batch_norm}")
        return self

    @property
    def in_training(self) -> str:
        """What batch norms are when training begins: "fold" or "live"; frozen ones are live ones until they are."""
        return "fold" if self.batch_norm == "fold" else "live"
