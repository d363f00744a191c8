"""How a layer is quantized: QConfig, in torch.ao's words. `qconfig_mapping` says which layer gets which."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from edgeqat.errors import PlanError
from edgeqat.observer_args import ACTIVATION_ARGUMENTS, WEIGHT_ARGUMENTS, wrong_argument

__all__ = ["REUSE_INPUT", "ActivationConfig", "ObserverArgs", "QConfig", "WeightConfig", "name_of"]

ObserverArgs: TypeAlias = Mapping[str, float] | tuple[tuple[str, float], ...]
"""Given as a mapping, kept as sorted pairs, which can be hashed."""

REUSE_INPUT = "reuse_input"
"""The observer of ops that only move integers: nothing to observe, for their output has their input's grid."""


@dataclass(frozen=True)
class ActivationConfig:
    """Per-tensor quantization of an activation to the integers 0 .. 2**bits - 1.

    Attributes:
        bits: Width of the integers.
        observer: How calibration picks the range: "minmax", "moving_average", "histogram", "percentile" or "mse";
            or a callable without arguments that makes an object with torch.ao's observer protocol (called with a
            tensor; `calculate_qparams()` gives scale and zero_point), such as `HistogramObserver.with_args(...)`.
        learned: Whether training moves the range (LSQ, LSQ+), from where calibration put it.
        symmetric: Whether the zero point is fixed in the middle, at 2**(bits-1), and only the scale is found, as in
            torch.ao's per_tensor_symmetric. Behind a fused ReLU nothing is below zero, and the zero point is 0.
        signed: Whether the grid is described by the integers -2**(bits-1) .. 2**(bits-1) - 1, as torch.ao's qint8
            has it. The points that it represents are the same, and so is everything computed: uint8 or int8 storage
            is the runtime's choice, a shift by 2**(bits-1).
        observer_args: Arguments of an observer that has a name: `bins` of "histogram" (2048), `averaging_constant`
            of "moving_average" (0.01), `percentile` of "percentile" (99.99).
    """

    bits: int = 8
    observer: str | Callable[[], Any] = "histogram"
    learned: bool = False
    symmetric: bool = False
    signed: bool = False
    observer_args: ObserverArgs = ()

    def __post_init__(self) -> None:
        _check_bits(self)
        object.__setattr__(self, "observer_args", _pairs(self.observer_args))
        if callable(self.observer):
            self._check_factory(self.observer)
        elif self.observer != REUSE_INPUT:
            _check_observer("ActivationConfig", self.observer, self.arguments, ACTIVATION_ARGUMENTS)

    def _check_factory(self, factory: Any) -> None:
        if hasattr(factory, "calculate_qparams") and not isinstance(factory, type):
            raise PlanError(
                f"ActivationConfig: found a {type(factory).__name__} as observer, wanted what makes one for each "
                "value: pass the class"
            )
        if self.observer_args:
            raise PlanError(
                f"ActivationConfig: found observer_args for {name_of(factory)}, which is no name; pass "
                "functools.partial, or the observer's with_args(...)"
            )

    @property
    def arguments(self) -> dict[str, float]:
        """The observer's arguments by name."""
        return dict(self.observer_args)

    @property
    def observer_name(self) -> str:
        """The observer as plans print it: its name, or that of the class or function that makes it."""
        return self.observer if isinstance(self.observer, str) else name_of(self.observer)

    def describe(self) -> str:
        """The range in words: "histogram", "symmetric signed percentile (percentile=99.9)"."""
        words = ["symmetric"] * self.symmetric + ["signed"] * self.signed + [self.observer_name]
        args = ", ".join(f"{name}={value:g}" for name, value in self.arguments.items())
        return " ".join([*words, *([f"({args})"] if args else [])])


@dataclass(frozen=True)
class WeightConfig:
    """Symmetric quantization of a weight.

    Attributes:
        bits: Integers +-(2**(bits-1) - 1). torch.ao's -128 .. 127 becomes -127 .. 127: negated, as a batch norm with
            a negative gain does, -128 would leave the grid.
        per_channel: One scale per output channel, or one for the tensor.
        observer: How the scale is found: "minmax", the largest |w|, taken afresh in every step, so that no weight is
            clipped; or in calibration: "mse", the scale of the smallest squared error; "percentile", which clips at
            most 0.01 % of the weights.
        learned: Whether training moves the scale (LSQ), from where calibration put it.
        observer_args: `percentile` of "percentile" (99.99); `eps` of any, the smallest scale (1e-10).
    """

    bits: int = 8
    per_channel: bool = True
    observer: str = "minmax"
    learned: bool = False
    observer_args: ObserverArgs = ()

    def __post_init__(self) -> None:
        _check_bits(self)
        object.__setattr__(self, "observer_args", _pairs(self.observer_args))
        _check_observer("WeightConfig", self.observer, self.arguments, WEIGHT_ARGUMENTS)

    @property
    def arguments(self) -> dict[str, float]:
        """The observer's arguments by name."""
        return dict(self.observer_args)


def _pairs(args: ObserverArgs) -> tuple[tuple[str, float], ...]:
    return tuple(sorted(dict(args).items()))


def _check_bits(config: ActivationConfig | WeightConfig) -> None:
    if not 2 <= config.bits <= 8:
        raise PlanError(f"{type(config).__name__}: found bits={config.bits}, wanted 2 to 8")


def _check_observer(kind: str, observer: object, args: Mapping[str, float], known: Mapping[str, Any]) -> None:
    if not isinstance(observer, str) or observer not in known:
        raise PlanError(f"{kind}: found observer {observer!r}, wanted one of {', '.join(known)}")
    wrong = wrong_argument(observer, args, known)
    if wrong:
        raise PlanError(f"{kind}: {wrong}")


def name_of(factory: Any) -> str:
    """What a factory makes: torch.ao's `with_args` and functools.partial are looked into, and fake quantization."""
    partial = getattr(factory, "p", factory)
    if isinstance(partial, functools.partial):
        return name_of(partial.keywords.get("observer", partial.func))
    return str(getattr(factory, "__name__", type(factory).__name__))


@dataclass(frozen=True)
class QConfig:
    """How a layer is quantized. `None` where a QConfig is wanted leaves the layer in float.

    Attributes:
        activation: Of the layer's output; and of a float input, where the layer is what brings it into the integers.
            An input that is in integers already has the grid of the layer that made it.
        weight: Of the layer's weight.
        output: Of the output alone, where it is to differ from `activation`.
    """

    activation: ActivationConfig = field(default_factory=ActivationConfig)
    weight: WeightConfig = field(default_factory=WeightConfig)
    output: ActivationConfig | None = None

    @property
    def result(self) -> ActivationConfig:
        """What the layer's output is quantized with."""
        return self.activation if self.output is None else self.output

    def at_least(self, weights: int, activations: int) -> QConfig:
        """The same with no fewer bits than these."""

        def wide(config: ActivationConfig) -> ActivationConfig:
            return replace(config, bits=max(config.bits, activations))

        weight = replace(self.weight, bits=max(self.weight.bits, weights))
        return QConfig(wide(self.activation), weight, None if self.output is None else wide(self.output))
