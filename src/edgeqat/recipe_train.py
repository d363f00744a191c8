"""The `train` section of a recipe: budgets, and what helps quantization-aware training at few bits."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from edgeqat.recipe_numbers import Bits, Count, Fraction, Positive, Rate
from edgeqat.recipe_quantize import Section

__all__ = [
    "AnnealedSection",
    "DampenSection",
    "DistillSection",
    "EmaSection",
    "FreezeSection",
    "OscillationSection",
    "StageSection",
    "TrainSection",
]

Share = Annotated[float, Field(ge=0, lt=1)]


class DistillSection(Section):
    """The fine-tuned float twin as a teacher of QAT: edgeqat.Distillation."""

    weight: Fraction = 0.5
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0


class EmaSection(Section):
    """Moving averages of the parameters, of QAT and of its float twin: edgeqat.Ema."""

    decay: Share = 0.999
    reestimate_batches: Positive = 50


class AnnealedSection(Section):
    """A number that changes in training: edgeqat.Annealed."""

    first: Rate
    last: Rate
    begin: Share = 0.25
    shape: Literal["cosine", "linear"] = "cosine"


class FreezeSection(AnnealedSection):
    """The frequency of oscillation above which a weight is frozen."""

    first: Rate = 0.1
    last: Rate = 0.01


class DampenSection(AnnealedSection):
    """The factor of the loss that dampens oscillation."""

    first: Rate = 0.0
    last: Rate = 0.1


class OscillationSection(Section):
    """Weights that oscillate between two integers: edgeqat.Oscillation."""

    momentum: Annotated[float, Field(gt=0, lt=1)] = 0.01
    max_bits: Bits = 4
    freeze: FreezeSection | None = None
    dampen: DampenSection | None = None


class StageSection(Section):
    """A stage of QAT before the last one, in which nothing has fewer bits than these."""

    epochs: Count
    weights: Bits | None = None
    activations: Bits | None = None

    @model_validator(mode="after")
    def _widens(self) -> StageSection:
        if self.weights is None and self.activations is None:
            raise ValueError("wanted weights or activations, the bits of the stage")
        return self


class TrainSection(Section):
    """Training; the float twin is fine-tuned with the budget of QAT, stage by stage."""

    optimizer: Literal["sgd", "adamw"] = "sgd"
    momentum: Fraction = 0.9
    weight_decay: Rate = 0.0005
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    float_epochs: Count = 8
    float_lr: Rate = 0.05
    qat_epochs: Count = 4
    qat_lr: Rate = 0.005
    freeze_batch_norm_after: Count | None = None
    reestimate_batches: Count = 0
    distill: DistillSection | None = None
    ema: EmaSection | None = None
    oscillation: OscillationSection | None = None
    progressive: list[StageSection] = Field(default=[])
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] = 0
