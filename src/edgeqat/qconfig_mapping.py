"""Which QConfig each layer gets: QConfigMapping, with torch.ao's rules and precedence.

`torch.ao.quantization` objects are accepted wherever ours are.
"""

from __future__ import annotations

import copy
import difflib
import operator
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from edgeqat.errors import PlanError
from edgeqat.qconfig import QConfig
from edgeqat.qconfig_torch import as_qconfig

__all__ = ["LayerId", "QConfigMapping", "as_mapping"]


@dataclass(frozen=True)
class LayerId:
    """What the rules of a mapping match.

    Attributes:
        module: Dotted name of the module whose forward computes it.
        type: That module's class name.
        op: Its ATen op: "conv2d", "add".
        index: How many of its kind its parent computes before it.
    """

    module: str
    type: str
    op: str = ""
    index: int = 0

    @property
    def is_library(self) -> bool:
        """Whether a module of torch.nn stands for it, so that its kind is that class and not the op."""
        return bool(self.module) and hasattr(nn, self.type)

    @property
    def kind(self) -> str:
        """The object type that torch.ao would know it by: the class of a library module, else the function."""
        return self.type if self.is_library else self.op

    @property
    def parent(self) -> str:
        """The module that calls it: for a library module the one around it, else the one that computes it."""
        return self.module.rpartition(".")[0] if self.is_library else self.module


@dataclass(frozen=True)
class _Pattern:
    """A regular expression that names must match: from their beginning, and `whole` says whether to their end."""

    regex: str
    whole: bool = True

    def matches(self, name: str) -> bool:
        return bool((re.fullmatch if self.whole else re.match)(self.regex, name))


@dataclass(frozen=True)
class _Refused:
    """A QConfig that has no counterpart, which matters only where there is a layer that it is for."""

    why: str


class QConfigMapping:
    """Which QConfig each layer gets.

    From the strongest rule to the weakest: the index-th op of a type in a module, a module's name, a regex, first and
    last layers, an object type, the global one. Setters return the mapping, so that they chain; setting the same again
    replaces it.

    >>> mapping = QConfigMapping().set_global(QConfig()).set_module_name("fc", None)
    >>> mapping.lookup(LayerId("fc", "Linear", "linear")) is None
    True
    >>> mapping.lookup(LayerId("conv1", "Conv2d", "conv2d")) == QConfig()
    True
    """

    def __init__(self) -> None:
        self._global: QConfig | None = QConfig()
        self._first_last: QConfig | None = None
        self._types: dict[str, QConfig | _Refused | None] = {}
        self._optional: set[str] = set()  # types that torch.ao's default mappings list, in the model or not
        self._regexes: dict[_Pattern, QConfig | None] = {}
        self._names: dict[str, QConfig | None] = {}
        self._orders: dict[tuple[_Pattern, str, int], QConfig | None] = {}

    def set_global(self, qconfig: Any) -> QConfigMapping:
        """Sets what applies where no other rule does."""
        self._global = as_qconfig(qconfig)
        return self

    def set_object_type(self, object_type: type | Callable[..., Any] | str, qconfig: Any) -> QConfigMapping:
        """Sets the QConfig of every layer of a type.

        Args:
            object_type: A module class or its name; or a function (torch.add, F.relu, operator.add) or its ATen
                name, for calls of it in modules of your own: as in torch.ao, an nn.Linear is no F.linear.
            qconfig: Ours, torch.ao's, or None.
        """
        self._types[_type_name(object_type)] = as_qconfig(qconfig)
        return self

    def set_module_name_regex(self, regex: str, qconfig: Any) -> QConfigMapping:
        """Sets the QConfig of every module whose whole dotted name matches; the first match counts."""
        self._regexes[_pattern(regex)] = as_qconfig(qconfig)
        return self

    def set_module_name(self, name: str, qconfig: Any) -> QConfigMapping:
        """Sets the QConfig of the module `name` and all below it."""
        self._names[name] = as_qconfig(qconfig)
        return self

    def set_module_name_object_type_order(
        self, module_name_regex: str, object_type: type | Callable[..., Any] | str, index: int, qconfig: Any
    ) -> QConfigMapping:
        """Sets the QConfig of one of several layers of a type that a module calls itself; the strongest rule.

        Args:
            module_name_regex: The calling module; its whole dotted name must match, "" is the model itself.
            object_type: As in `set_object_type`.
            index: Which of them, in the order of execution, from 0.
            qconfig: Ours, torch.ao's, or None.
        """
        if isinstance(index, bool) or not isinstance(index, int) or index < 0:
            raise PlanError(f"found the index {index!r} of {_type_name(object_type)}, wanted 0 or above")
        self._orders[_pattern(module_name_regex), _type_name(object_type), index] = as_qconfig(qconfig)
        return self

    def set_first_last(self, qconfig: Any) -> QConfigMapping:
        """Sets the QConfig of the first and the last layers with weights, which networks of few bits keep at 8.

        Its `weight` is that of their weights. Its `activation` is that of what they read and of what the last ones
        give. What the first ones give keeps its own. A layer that a rule names (by index, name or regex), or that is
        left in float, keeps all of its own.

        Args:
            qconfig: Ours or torch.ao's; None for no such rule.
        """
        self._first_last = as_qconfig(qconfig)
        return self

    @property
    def first_last(self) -> QConfig | None:
        """What `set_first_last` was given."""
        return self._first_last

    def at_least(self, weights: int = 2, activations: int = 2) -> QConfigMapping:
        """A copy in which nothing has fewer bits than these, for the stages before the last of progressive training.

        >>> from edgeqat.qconfig import WeightConfig
        >>> mapping = QConfigMapping().set_global(QConfig(weight=WeightConfig(bits=4)))
        >>> mapping.at_least(weights=6).lookup(LayerId("fc", "Linear")).weight.bits
        6
        """

        def widened(found: Any) -> Any:
            return found.at_least(weights, activations) if isinstance(found, QConfig) else found

        wide = copy.copy(self)
        wide._global, wide._first_last = widened(self._global), widened(self._first_last)
        wide._types = {key: widened(found) for key, found in self._types.items()}
        wide._optional = set(self._optional)
        wide._regexes = {key: widened(found) for key, found in self._regexes.items()}
        wide._names = {key: widened(found) for key, found in self._names.items()}
        wide._orders = {key: widened(found) for key, found in self._orders.items()}
        return wide

    def lookup(self, layer: LayerId) -> QConfig | None:
        """The QConfig of a layer, but for what `set_first_last` makes of it, which its place in the network decides.

        Raises:
            PlanError: It is a QConfig of torch.ao's default mappings that has no counterpart.
        """
        named = self._named(layer)
        if named is not None:
            return named[0]
        found = self._types.get(layer.type, self._types.get(layer.kind, self._global))
        if isinstance(found, _Refused):
            raise PlanError(f"{layer.module or '<model>'} ({layer.kind}): {found.why}")
        return found

    def names(self, layer: LayerId) -> bool:
        """Whether a rule names the layer: by index, name or regex."""
        return self._named(layer) is not None

    def _named(self, layer: LayerId) -> tuple[QConfig | None] | None:
        """What such a rule says; None where none does."""
        for (pattern, kind, index), qconfig in self._orders.items():
            if index == layer.index and kind == layer.kind and pattern.matches(layer.parent):
                return (qconfig,)
        path = layer.module
        while path:
            if path in self._names:
                return (self._names[path],)
            path = path.rpartition(".")[0]
        for pattern, qconfig in self._regexes.items():
            if pattern.matches(layer.module):
                return (qconfig,)
        return None

    def names_inside(self, block: str, module: str) -> bool:
        """Whether a rule names `module`, or what holds it, and neither the module `block` nor what holds that."""
        path = module
        while path and path != block and not block.startswith(f"{path}."):
            if path in self._names:
                return True
            path = path.rpartition(".")[0]
        return False

    def check_used(self, layers: Iterable[LayerId]) -> None:
        """Checks that every rule matches one of the layers.

        Raises:
            PlanError: A rule matches nothing; the message suggests the nearest name.
        """
        layers = list(layers)
        names = {layer.module for layer in layers}
        prefixes = {".".join(n.split(".")[:i]) for n in names for i in range(1, n.count(".") + 2)}
        for name in self._names:
            if name not in prefixes:
                raise PlanError(f"the rule for module {name!r} matches nothing{_nearest(name, prefixes)}")
        for pattern in self._regexes:
            if not any(pattern.matches(name) for name in names):
                raise PlanError(
                    f"the rule for regex {pattern.regex!r} matches no module; names look like {min(names)!r}"
                )
        types = {name for layer in layers for name in (layer.type, layer.kind)}
        for type_name in self._types:
            if type_name not in types | self._optional:
                raise PlanError(f"the rule for type {type_name!r} matches nothing{_nearest(type_name, types)}")
        for pattern, kind, index in self._orders:
            self._check_order(pattern, kind, index, layers)

    def _check_order(self, pattern: _Pattern, kind: str, index: int, layers: Sequence[LayerId]) -> None:
        rule = f"the rule for {kind!r} number {index} in modules like {pattern.regex!r}"
        inside = [layer for layer in layers if pattern.matches(layer.parent)]
        if not inside:
            parents = {layer.parent for layer in layers}
            raise PlanError(f"{rule} matches no module that computes anything{_nearest(pattern.regex, parents)}")
        alike = [layer.index for layer in inside if layer.kind == kind]
        if not alike:
            raise PlanError(f"{rule} matches nothing{_nearest(kind, {layer.kind for layer in inside})}")
        if index not in alike:
            raise PlanError(f"{rule} matches nothing; they are numbered 0 to {max(alike)}")


def _pattern(regex: str, whole: bool = True) -> _Pattern:
    try:
        re.compile(regex)
    except re.error as error:
        raise PlanError(f"found the regex {regex!r}, which is not one: {error}") from error
    return _Pattern(regex, whole)


_ATEN_NAMES = {operator.truediv: "div", operator.iadd: "add", operator.isub: "sub", operator.imul: "mul"}
"""Functions whose ATen op has another name."""


def _type_name(object_type: Any) -> str:
    """The name that a rule for an object type matches: a class's, or that of a function's ATen op."""
    if isinstance(object_type, str):
        # torch.ao lists "sigmoid_" beside "sigmoid"; captured graphs hold no in-place ops.
        return object_type.rstrip("_") if object_type.islower() else object_type
    name = getattr(object_type, "__name__", None)
    if name is None:
        found = type(object_type).__name__
        raise PlanError(f"found a {found} as object type, wanted a module class, a function, or the name of one")
    if isinstance(object_type, type):
        return str(name)
    return _ATEN_NAMES.get(object_type, str(name).split(".")[0].strip("_"))


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


def _mapping_from_torch(mapping: torch.ao.quantization.QConfigMapping) -> QConfigMapping:
    ours = QConfigMapping().set_global(mapping.global_qconfig)
    _types_from_torch(mapping.object_type_qconfigs, ours)
    for regex, qconfig in mapping.module_name_regex_qconfigs.items():
        ours._regexes[_pattern(regex, whole=False)] = as_qconfig(qconfig)  # torch.ao matches the beginning
    for name, qconfig in mapping.module_name_qconfigs.items():
        ours.set_module_name(name, qconfig)
    for (name, object_type, index), qconfig in mapping.module_name_object_type_order_qconfigs.items():
        ours.set_module_name_object_type_order(re.escape(name), object_type, index, qconfig)
    return ours


def _types_from_torch(types: Mapping[Any, Any], ours: QConfigMapping) -> None:
    """Sets the rules for object types. Those of a default mapping may match nothing, or be refused when they do."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of processors that torch.ao's own kernels are not made for
        listed = set(torch.ao.quantization.get_default_qconfig_mapping("onednn").object_type_qconfigs)
    by_default = listed if listed <= set(types) else set()
    given: dict[str, tuple[Any, Any]] = {}
    for object_type, qconfig in types.items():
        name = _type_name(object_type)
        first, other = given.setdefault(name, (object_type, qconfig))
        if not _is_same(qconfig, other):
            raise PlanError(
                f"{_spelling(first)} and {_spelling(object_type)} are one op, {name!r}, and have different QConfigs; "
                "give them one"
            )
        try:
            ours._types[name] = as_qconfig(qconfig, weightless=name in _FLOAT_WEIGHTS)
        except PlanError as error:
            if object_type not in by_default:
                raise
            ours._types[name] = _Refused(str(error))
        if object_type in by_default:
            ours._optional.add(name)


_FLOAT_WEIGHTS = ("LayerNorm", "layer_norm")
"""Types whose weight torch.ao's default mappings leave in float, which says nothing of an integer kernel's."""


def _is_same(one: Any, other: Any) -> bool:
    return one is other or (one is not None and other is not None and torch.ao.quantization.qconfig_equals(one, other))


def _spelling(object_type: Any) -> str:
    return repr(object_type) if isinstance(object_type, str) else f"the function {object_type.__name__}"
