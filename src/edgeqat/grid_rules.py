"""What targets want of grids, and the settings that follow it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from edgeqat.errors import PlanError
from edgeqat.graph.form import Form
from edgeqat.op_attrs import Attrs
from edgeqat.program import PASSTHROUGH
from edgeqat.qconfig import ActivationConfig, QConfig
from edgeqat.target_table import Target

__all__ = ["GridRules", "activation_of"]


@dataclass(frozen=True)
class GridRules:
    """What the grids of one plan must be. Each rule is the name of the target that has it, "" where none does.

    Attributes:
        symmetric: The zero point of activations is the middle of their integers; but for the next rule, that of what
            is rectified is 0.
        centred: It is the middle for rectified values too, so that a ReLU is an op of its own.
        power_of_two_activations: Scales of activations are powers of two.
        per_tensor_weights: A weight has one scale.
        power_of_two_weights: Scales of weights are powers of two.
    """

    symmetric: str = ""
    centred: str = ""
    power_of_two_activations: str = ""
    per_tensor_weights: str = ""
    power_of_two_weights: str = ""

    @staticmethod
    def of(targets: Sequence[Target], batch_norm: str = "fold") -> GridRules:
        """The rules of several targets together.

        Raises:
            PlanError: A live batch norm would change the scales of weights.
        """

        def first(wanted: Sequence[bool]) -> str:
            return next((t.name for t, want in zip(targets, wanted, strict=True) if want), "")

        power_of_two_weights = first([t.power_of_two_weights for t in targets])
        if power_of_two_weights and batch_norm != "fold":
            raise PlanError(
                f"{power_of_two_weights} takes power-of-two scales of weights, and a live batch norm multiplies each "
                "by its gain; use batch_norm: fold"
            )
        return GridRules(
            symmetric=first([t.symmetric_activations for t in targets]),
            centred=first([t.centred for t in targets]),
            power_of_two_activations=first([t.power_of_two_activations for t in targets]),
            per_tensor_weights=first([not t.per_channel_weights for t in targets]),
            power_of_two_weights=power_of_two_weights,
        )

    def check(self, targets: Sequence[Target], where: str, form: Form, qconfig: QConfig) -> None:
        """Whether all targets take what a layer asks for.

        Raises:
            PlanError: One does not; `where` names the layer.
        """
        for rule in targets:
            for config in (qconfig.activation, qconfig.result):
                if form.kind not in PASSTHROUGH and config.bits not in rule.activation_bits:
                    raise PlanError(_wrong_bits(where, config.bits, "activations", rule.name, rule.activation_bits))
            if form.weight is not None and qconfig.weight.bits not in rule.weight_bits:
                raise PlanError(_wrong_bits(where, qconfig.weight.bits, "weights", rule.name, rule.weight_bits))
            narrowed = self.power_of_two_activations and activation_of(form.attrs) == "relu6"
            if narrowed and not rule.clamps_anywhere:
                raise PlanError(
                    f"{where}: on the power-of-two scales of {self.power_of_two_activations} a ReLU6 ends within the "
                    f"grid, and {rule.name} cannot clamp there; make a plan for each of the two"
                )
        learned = form.kind not in PASSTHROUGH and (qconfig.activation.learned or qconfig.result.learned)
        if self.power_of_two_activations and learned:
            raise PlanError(_learned(where, "activations", self.power_of_two_activations))
        if self.power_of_two_weights and form.weight is not None and qconfig.weight.learned:
            raise PlanError(_learned(where, "weights", self.power_of_two_weights))

    def follow(self, qconfig: QConfig) -> QConfig:
        """The settings, with what the targets want in place of what was asked for."""
        output = None if qconfig.output is None else self._followed(qconfig.output)
        weight = replace(qconfig.weight, per_channel=False) if self.per_tensor_weights else qconfig.weight
        return QConfig(self._followed(qconfig.activation), weight, output)

    def _followed(self, config: ActivationConfig) -> ActivationConfig:
        return replace(config, symmetric=True) if self.symmetric else config

    def note(self, weighted: bool = False) -> str:
        """What targets want of a value's grid, and of the weight it is made with, as the end of a reason."""
        wishes = [(self.symmetric, "symmetric activations"), (self.power_of_two_activations, "power-of-two scales")]
        if weighted:
            wishes += [(self.per_tensor_weights, "one scale per weight")]
            wishes += [(self.power_of_two_weights, "power-of-two scales of weights")]
        named = dict.fromkeys(name for name, _ in wishes if name)
        return "".join(f"; {name} takes {', '.join(what for n, what in wishes if n == name)}" for name in named)

    def split(self, name: str, attrs: Attrs) -> tuple[str, Attrs]:
        """The name of what an op computes and its attributes: without its ReLU, where that is an op of its own."""
        if not self.centred or activation_of(attrs) is None:
            return name, attrs
        return f"{name}:unclamped", replace(attrs, activation=None)  # type: ignore[arg-type]


def activation_of(attrs: Attrs) -> str | None:
    """The activation function that is fused into an op."""
    activation: str | None = getattr(attrs, "activation", None)
    return activation


def _wrong_bits(where: str, bits: int, what: str, target: str, taken: frozenset[int]) -> str:
    return f"{where}: found {bits}-bit {what}, but {target} takes {', '.join(map(str, sorted(taken)))} bits"


def _learned(where: str, what: str, target: str) -> str:
    return f"{where}: found learned scales of {what}, but {target} takes powers of two; use learned: false"
