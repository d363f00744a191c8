"""The QConfig objects of `torch.ao.quantization` in our own words; what has no counterpart is refused by name.

    quint8, qint8                              ActivationConfig(signed=...)
    per_tensor_affine, per_tensor_symmetric    ActivationConfig(symmetric=...)
    per_tensor_symmetric, per_channel_...      WeightConfig(per_channel=...)
    MinMaxObserver, ..., with their arguments  observer, observer_args
    _LearnableFakeQuantize                     learned
    reduce_range of activations                weights of 7 bits
    an observer of one's own, and settings     the factory itself, as observer
      that an observer of ours does not have

Only `weight` differs in a number: -128 .. 127 becomes -127 .. 127 (see WeightConfig). Where quant_min and quant_max of
a symmetric quint8 are given, torch.ao's zero point is 127; ours is always 128.

reduce_range halves the integers of activations, so that two products fit the 16 bits in which x86 without VNNI adds
them: 127 * (127 + 127). No kernel clamps to 7 bits, so that each activation would cost a clip of its own; weights
of 7 bits keep the same promise, 255 * (63 + 63), and need no op. The reduce_range of ONNX Runtime's own quantizer is
that of weights too.
"""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch

from edgeqat.errors import PlanError
from edgeqat.qconfig import REUSE_INPUT, ActivationConfig, QConfig, WeightConfig, name_of

__all__ = ["as_qconfig"]

ACTIVATION_OBSERVERS = {
    "MinMaxObserver": "minmax",
    "MovingAverageMinMaxObserver": "moving_average",
    "HistogramObserver": "histogram",
}
# A weight's moving average over the steps of one tensor is its latest value: min-max is what it stands for.
WEIGHT_OBSERVERS = (
    "MinMaxObserver",
    "PerChannelMinMaxObserver",
    "MovingAverageMinMaxObserver",
    "MovingAveragePerChannelMinMaxObserver",
)

_SIGNED = (torch.qint8, torch.int8)
_UNSIGNED = (torch.quint8, torch.uint8)
_PER_CHANNEL = {
    torch.per_channel_symmetric: torch.per_tensor_symmetric,
    torch.per_channel_affine: torch.per_tensor_affine,
}
REDUCED_BITS = 7
"""Of weights, for reduce_range."""

_EPS = torch.finfo(torch.float32).eps
"""The smallest scale of torch.ao's observers, where they are not told another."""

_FIND_NOTHING = ("PlaceholderObserver", "NoopObserver", "RecordingObserver")

_DEFAULTS = {"averaging_constant": 0.01, "bins": 2048}


def as_qconfig(qconfig: Any, *, weightless: bool = False) -> QConfig | None:
    """A QConfig of ours from ours, torch.ao's, or None.

    Args:
        qconfig: Any of these.
        weightless: Leave torch.ao's weight setting out, whatever it is.

    Raises:
        PlanError: It is none of these, or uses what has no counterpart.
    """
    if qconfig is None or isinstance(qconfig, QConfig):
        return qconfig
    if not isinstance(qconfig, torch.ao.quantization.QConfig):
        raise PlanError(f"found a {type(qconfig).__name__} as QConfig, wanted edgeqat.QConfig, torch.ao's, or None")
    activation, reduced = _activation(qconfig.activation)
    if weightless or activation.observer == REUSE_INPUT:  # what only moves integers has no weight
        return QConfig(activation)
    weight = _weight(qconfig.weight)
    return QConfig(activation, replace(weight, bits=min(weight.bits, REDUCED_BITS)) if reduced else weight)


@dataclass(frozen=True)
class _Made:
    """What a factory makes.

    Attributes:
        observer: The observer, inside a fake quantization or not.
        scheme: What the factory was told, which the observer itself may not take.
        learned: Whether the fake quantization around it learns its range.
    """

    observer: Any
    scheme: Any
    learned: bool

    @property
    def kind(self) -> str:
        return type(self.observer).__name__

    @property
    def is_known(self) -> bool:
        """Whether its class is torch.ao's or torchao's, so that its name says what it does."""
        return type(self.observer).__module__.split(".")[0] in ("torch", "torchao")

    def integers(self) -> tuple[int, int]:
        low, high = (getattr(self.observer, key, None) for key in ("quant_min", "quant_max"))
        return (0, 255) if low is None or high is None else (int(low), int(high))


def _activation(factory: Any) -> tuple[ActivationConfig, bool]:
    """The setting of activations; and whether they were to have a bit less, which their weights then have."""
    made = _make(factory)
    observer, kind = made.observer, made.kind
    if kind == "ReuseInputObserver":
        return ActivationConfig(observer=REUSE_INPUT), False
    dtype = getattr(observer, "dtype", torch.quint8)
    if dtype not in (*_SIGNED, *_UNSIGNED) or getattr(observer, "is_dynamic", False):
        dynamic = "dynamic " if getattr(observer, "is_dynamic", False) else ""
        raise PlanError(f"found the observer {kind} of {dynamic}{dtype}, wanted static quantization to 8 bits or less")
    if kind in _FIND_NOTHING or not callable(getattr(observer, "calculate_qparams", None)):
        raise PlanError(f"found {kind} as observer of activations, which finds no range")
    if made.scheme not in (None, torch.per_tensor_affine, torch.per_tensor_symmetric):
        raise PlanError(
            f"found the observer {kind} with {made.scheme} for activations, wanted torch.per_tensor_affine or "
            "torch.per_tensor_symmetric: an activation has one scale"
        )
    low, high = made.integers()
    bits = (high - low).bit_length()
    if made.is_known and high - low + 1 != 2**bits:
        raise PlanError(
            f"found the observer {kind} with the integers {low} .. {high}, wanted 2**bits of them, such as 0 .. 255: "
            "integer kernels clamp to nothing else"
        )
    args, own = _arguments(made)
    reduced = bool(getattr(observer, "reduce_range", False))
    config = ActivationConfig(
        bits=min(bits + reduced, 8),  # its integers are halved already
        observer=ACTIVATION_OBSERVERS[kind] if own else factory,
        learned=made.learned,
        symmetric=made.scheme is torch.per_tensor_symmetric,
        signed=dtype in _SIGNED and low < 0,
        observer_args=args if own else {},
    )
    return config, reduced


def _arguments(made: _Made) -> tuple[dict[str, float], bool]:
    """The arguments of an observer where they differ from the default; and whether one of ours takes all it has."""
    if not made.is_known or made.kind not in ACTIVATION_OBSERVERS or float(made.observer.eps) != _EPS:
        return {}, False
    found = {name: getattr(made.observer, name, default) for name, default in _DEFAULTS.items()}
    return {name: value for name, value in found.items() if value != _DEFAULTS[name]}, True


def _weight(factory: Any) -> WeightConfig:
    made = _make(factory)
    observer, kind = made.observer, made.kind
    if not made.is_known or kind not in WEIGHT_OBSERVERS:
        raise PlanError(
            f"found the weight observer {kind}, wanted one of {', '.join(WEIGHT_OBSERVERS)}; edgeqat.WeightConfig has "
            "mse and percentile"
        )
    if made.scheme not in (torch.per_tensor_symmetric, torch.per_channel_symmetric):
        raise PlanError(
            f"found the weight scheme {made.scheme}, wanted a symmetric one: affine weights run nowhere fast"
        )
    per_channel = made.scheme is torch.per_channel_symmetric
    axis = getattr(observer, "ch_axis", 0)
    if per_channel and axis != 0:
        raise PlanError(f"found the weight observer {kind} with ch_axis={axis}, wanted 0: a scale an output channel")
    low, high = made.integers()
    eps = float(observer.eps)
    return WeightConfig(
        bits=(high - low).bit_length(),
        per_channel=per_channel,
        learned=made.learned,
        observer_args={} if eps == _EPS else {"eps": eps},
    )


def _make(factory: Any) -> _Made:
    """What a torch.ao factory makes.

    torch itself refuses to make some, which are plain in their meaning: MinMaxObserver with a per-channel scheme is
    made with the per-tensor one.
    """
    scheme = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of reduce_range, which has another meaning here
            try:
                module = factory()
            except NotImplementedError:
                scheme, per_tensor = _per_tensor(factory)
                if scheme is None:
                    raise
                module = per_tensor()
    except Exception as error:
        text = " ".join(str(error).split())
        raise PlanError(f"the observer factory {name_of(factory)} failed: {type(error).__name__}: {text}") from error
    observer = getattr(module, "activation_post_process", module)
    learned = type(module).__name__ == "_LearnableFakeQuantize"
    return _Made(observer, getattr(observer, "qscheme", None) if scheme is None else scheme, learned)


def _per_tensor(factory: Any) -> tuple[Any, Any]:
    """(the per-channel scheme that a factory asks for, None without one; a factory with the per-tensor one instead).

    `with_args` makes partials, of a class or of another partial, and a fake quantization names its observer in one.
    """
    partial = getattr(factory, "p", factory)
    if not isinstance(partial, functools.partial):
        return None, factory
    scheme = partial.keywords.get("qscheme")
    if scheme in _PER_CHANNEL:
        return scheme, functools.partial(partial, qscheme=_PER_CHANNEL[scheme])
    scheme, inner = _per_tensor(partial.keywords.get("observer"))
    if scheme is not None:
        return scheme, functools.partial(partial, observer=inner)
    scheme, inner = _per_tensor(partial.func)
    return scheme, functools.partial(inner, *partial.args, **partial.keywords)
