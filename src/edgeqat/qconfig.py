"""Which settings each layer is quantized with: QConfig and QConfigMapping, in torch.ao's words and precedence.

`torch.ao.quantization` objects are accepted wherever ours are; `from_torch` translates them, or refuses by name
what has no counterpart.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from edgeqat.errors import PlanError

__all__ = ["ActivationConfig", "QConfig", "QConfigMapping", "WeightConfig", "as_mapping"]

OBSERVERS = ("minmax", "moving_average", "histogram", "percentile", "mse")
WEIGHT_OBSERVERS = ("minmax", "mse", "percentile")


@dataclass(frozen=True)
class ActivationConfig:
    """Affine per-tensor quantization of an activation.

    Attributes:
        bits: Integers 0 .. 2**bits - 1.
        observer: How calibration picks the range: "minmax", "moving_average", "histogram", "percentile" or "mse";
            or a callable without arguments that makes an object with torch.ao's observer protocol (called with a
            tensor; `calculate_qparams()` gives scale and zero_point), such as `HistogramObserver.with_args(...)`.
        learned: Whether training moves the range (LSQ, LSQ+), from where calibration put it.
    """

    bits: int = 8
    observer: str | Callable[[], Any] = "histogram"
    learned: bool = False

    def __post_init__(self) -> None:
        _check(self, OBSERVERS)

    @property
    def observer_name(self) -> str:
        """The observer as plans print it: its name, or that of the class or function that makes it."""
        return self.observer if isinstance(self.observer, str) else _name_of(self.observer)


@dataclass(frozen=True)
class WeightConfig:
    """Symmetric quantization of a weight.

    Attributes:
        bits: Integers +-(2**(bits-1) - 1).
        per_channel: One scale per output channel, or one for the tensor.
        observer: How the scale is found: "minmax", the largest |w|, taken afresh in every step, so that no weight is
            clipped; or in calibration: "mse", the scale of the smallest squared error; "percentile", which clips at
            most 0.01 % of the weights.
        learned: Whether training moves the scale (LSQ), from where calibration put it.
    """

    bits: int = 8
    per_channel: bool = True
    observer: str = "minmax"
    learned: bool = False

    def __post_init__(self) -> None:
        _check(self, WEIGHT_OBSERVERS)


def _check(config: ActivationConfig | WeightConfig, observers: Sequence[str]) -> None:
    kind = type(config).__name__
    if not 2 <= config.bits <= 8:
        raise PlanError(f"{kind}: found bits={config.bits}, wanted 2 to 8")
    if isinstance(config, ActivationConfig) and callable(config.observer):
        if hasattr(config.observer, "calculate_qparams") and not isinstance(config.observer, type):
            made = type(config.observer).__name__
            raise PlanError(
                f"{kind}: found a {made} as observer, wanted what makes one for each value: pass the class"
            )
    elif config.observer not in observers:
        raise PlanError(f"{kind}: found observer {config.observer!r}, wanted one of {', '.join(observers)}")


def _name_of(factory: Any) -> str:
    """What a factory makes: torch.ao's `with_args` and functools.partial are looked into, and fake quantization."""
    partial = getattr(factory, "p", factory)
    inner = getattr(partial, "keywords", {}).get("observer", getattr(partial, "func", factory))
    return str(getattr(inner, "__name__", type(inner).__name__))


@dataclass(frozen=True)
class QConfig:
    """How a layer's output and weight are quantized. `None` where a QConfig is wanted leaves the layer in float."""

    activation: ActivationConfig = field(default_factory=ActivationConfig)
    weight: WeightConfig = field(default_factory=WeightConfig)


class QConfigMapping:
    """Which QConfig each layer gets; a name beats a regex, a regex a type, a type the global one.

    Setters return the mapping, so that they chain:

    >>> mapping = QConfigMapping().set_global(QConfig()).set_module_name("fc", None)
    >>> mapping.lookup("fc", "Linear") is None
    True
    >>> mapping.lookup("conv1", "Conv2d") == QConfig()
    True
    """

    def __init__(self) -> None:
        self._global: QConfig | None = QConfig()
        self._types: dict[str, QConfig | None] = {}
        self._regexes: list[tuple[str, QConfig | None]] = []
        self._names: dict[str, QConfig | None] = {}

    def set_global(self, qconfig: Any) -> QConfigMapping:
        """Sets what applies where no other rule does."""
        self._global = as_qconfig(qconfig)
        return self

    def set_object_type(self, object_type: type | str, qconfig: Any) -> QConfigMapping:
        """Sets the QConfig of every module of a class, given as the class or its name."""
        name = object_type if isinstance(object_type, str) else object_type.__name__
        self._types[name] = as_qconfig(qconfig)
        return self

    def set_module_name_regex(self, regex: str, qconfig: Any) -> QConfigMapping:
        """Sets the QConfig of every module whose whole dotted name matches; the first match counts."""
        try:
            re.compile(regex)
        except re.error as error:
            raise PlanError(f"found the regex {regex!r}, which is not one: {error}") from error
        self._regexes.append((regex, as_qconfig(qconfig)))
        return self

    def set_module_name(self, name: str, qconfig: Any) -> QConfigMapping:
        """Sets the QConfig of the module `name` and all below it."""
        self._names[name] = as_qconfig(qconfig)
        return self

    def lookup(self, module: str, type_name: str) -> QConfig | None:
        """The QConfig of the module with this dotted name and class name."""
        path = module
        while path:
            if path in self._names:
                return self._names[path]
            path = path.rpartition(".")[0]
        for regex, qconfig in self._regexes:
            if re.fullmatch(regex, module):
                return qconfig
        return self._types.get(type_name, self._global)

    def names_inside(self, block: str, module: str) -> bool:
        """Whether a rule names `module`, or what holds it, and neither the module `block` nor what holds that."""
        path = module
        while path and path != block and not block.startswith(f"{path}."):
            if path in self._names:
                return True
            path = path.rpartition(".")[0]
        return False

    def check_used(self, modules: Sequence[tuple[str, str]]) -> None:
        """Checks that every rule matches one of the modules, given as (dotted name, class name).

        Raises:
            PlanError: A rule matches nothing; the message suggests the nearest name.
        """
        names = {name for name, _ in modules}
        prefixes = {".".join(n.split(".")[:i]) for n in names for i in range(1, n.count(".") + 2)}
        for name in self._names:
            if name not in prefixes:
                raise PlanError(f"the rule for module {name!r} matches nothing{_nearest(name, prefixes)}")
        for regex, _ in self._regexes:
            if not any(re.fullmatch(regex, name) for name in names):
                raise PlanError(f"the rule for regex {regex!r} matches no module; names look like {min(names)!r}")
        types = {type_name for _, type_name in modules}
        for type_name in self._types:
            if type_name not in types:
                raise PlanError(f"the rule for type {type_name!r} matches nothing{_nearest(type_name, types)}")


def _nearest(name: str, known: set[str]) -> str:
    close = difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.4)
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else f"; found {sorted(known)[:8]}"


def as_mapping(mapping: Any) -> QConfigMapping:
    """A QConfigMapping of ours from ours, torch.ao's, a bare QConfig (global), or None (the default).

    Raises:
        PlanError: It is none of these, or uses what has no counterpart.
    """
    if mapping is None:
        return QConfigMapping()
    if isinstance(mapping, QConfigMapping):
        return mapping
    if isinstance(mapping, torch.ao.quantization.QConfigMapping):
        return _mapping_from_torch(mapping)
    return QConfigMapping().set_global(mapping)


def as_qconfig(qconfig: Any) -> QConfig | None:
    """A QConfig of ours from ours, torch.ao's, or None.

    Raises:
        PlanError: It is none of these, or uses what has no counterpart.
    """
    if qconfig is None or isinstance(qconfig, QConfig):
        return qconfig
    if isinstance(qconfig, torch.ao.quantization.QConfig):
        return QConfig(_activation_from_torch(qconfig.activation), _weight_from_torch(qconfig.weight))
    raise PlanError(f"found a {type(qconfig).__name__} as QConfig, wanted edgeqat.QConfig, torch.ao's, or None")


def _mapping_from_torch(mapping: torch.ao.quantization.QConfigMapping) -> QConfigMapping:
    if mapping.module_name_object_type_order_qconfigs:
        raise PlanError("set_module_name_object_type_order has no counterpart yet; use set_module_name")
    ours = QConfigMapping().set_global(mapping.global_qconfig)
    for object_type, qconfig in mapping.object_type_qconfigs.items():
        name = object_type if isinstance(object_type, str) else object_type.__name__
        ours.set_object_type(name, qconfig)
    for regex, qconfig in mapping.module_name_regex_qconfigs.items():
        ours.set_module_name_regex(regex, qconfig)
    for name, qconfig in mapping.module_name_qconfigs.items():
        ours.set_module_name(name, qconfig)
    return ours


TORCH_OBSERVERS = {
    "MinMaxObserver": "minmax",
    "PerChannelMinMaxObserver": "minmax",
    "MovingAverageMinMaxObserver": "moving_average",
    "MovingAveragePerChannelMinMaxObserver": "moving_average",
    "HistogramObserver": "histogram",
}


_INTEGER_TYPES = (torch.quint8, torch.qint8, torch.uint8, torch.int8)


def _activation_from_torch(factory: Any) -> ActivationConfig:
    observer = _made_by(factory)
    if observer is None:
        known, first, last, _ = _read_factory(factory)
        return ActivationConfig(bits=(last - first).bit_length(), observer=known)
    kind, dtype = type(observer).__name__, getattr(observer, "dtype", torch.quint8)
    if dtype not in _INTEGER_TYPES or getattr(observer, "is_dynamic", False):
        dynamic = "dynamic " if getattr(observer, "is_dynamic", False) else ""
        raise PlanError(f"found the observer {kind} of {dynamic}{dtype}, wanted static quantization to 8 bits or less")
    low, high = (getattr(observer, key, None) for key in ("quant_min", "quant_max"))
    bits = 8 if low is None or high is None else (int(high) - int(low)).bit_length()
    name = _counterpart(observer)
    return ActivationConfig(bits=bits, observer=factory if name is None else name)


def _weight_from_torch(factory: Any) -> WeightConfig:
    # A weight's moving average over the steps of one tensor is its latest value: min-max is what it stands for.
    observer = _made_by(factory)
    if observer is None:
        _, low, high, scheme = _read_factory(factory)
    elif TORCH_OBSERVERS.get(type(observer).__name__) is None:
        known = ", ".join(TORCH_OBSERVERS)
        raise PlanError(f"found the weight observer {type(observer).__name__}, wanted one of {known}")
    else:
        low, high, scheme = int(observer.quant_min), int(observer.quant_max), observer.qscheme
    per_channel = scheme in (torch.per_channel_symmetric, torch.per_channel_affine)
    if scheme in (torch.per_tensor_affine, torch.per_channel_affine):
        raise PlanError(f"found the weight scheme {scheme}, wanted a symmetric one: affine weights run nowhere fast")
    return WeightConfig(bits=(high - low).bit_length(), per_channel=per_channel)


def _made_by(factory: Any) -> Any:
    """The observer that a torch.ao factory makes; None where torch itself refuses to make it.

    torch rejects at run time e.g. MinMaxObserver with a per-channel scheme, which is plain in its meaning.
    """
    try:
        module = factory()
    except (NotImplementedError, AssertionError, TypeError):
        return None
    except Exception as error:
        text = " ".join(str(error).split())
        raise PlanError(f"the observer factory {_name_of(factory)} failed: {type(error).__name__}: {text}") from error
    return getattr(module, "activation_post_process", module)


def _counterpart(observer: Any) -> str | None:
    """Our name for a torch.ao observer, or torchao's; None for other classes and for settings we do not have."""
    own = type(observer).__module__.split(".")[0] in ("torch", "torchao")
    usual = getattr(observer, "averaging_constant", 0.01) == 0.01 and getattr(observer, "bins", 2048) == 2048
    return TORCH_OBSERVERS.get(type(observer).__name__) if own and usual else None


def _read_factory(factory: Any) -> tuple[str, int, int, Any]:
    """(observer, quant_min, quant_max, qscheme) of a torch.ao observer or fake-quantize factory."""
    partial = getattr(factory, "p", factory)
    settings = dict(getattr(partial, "keywords", {}))
    observer = settings.get("observer", getattr(partial, "func", None))
    name = TORCH_OBSERVERS.get(getattr(observer, "__name__", ""))
    if name is None or "quant_min" not in settings or "quant_max" not in settings:
        raise PlanError(f"found the factory {factory!r}, wanted a torch.ao observer with quant_min and quant_max")
    return (
        name,
        settings["quant_min"],
        settings["quant_max"],
        settings.get("qscheme", torch.per_tensor_affine),
    )
