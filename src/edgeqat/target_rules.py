"""Which targets a plan is made for: names and files resolved to the rules it must satisfy."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from edgeqat.errors import PlanError
from edgeqat.program import Kind
from edgeqat.target_file import load_target_file
from edgeqat.target_name import is_target_file
from edgeqat.target_table import ALL_KINDS, PORTABLE, TARGETS, Target, runtime_of

__all__ = ["resolve_targets", "targets"]

MEANT: Mapping[str, str] = MappingProxyType(
    {
        "onnx": "onnxruntime",
        "ort": "onnxruntime",
        "tflite": "litert",
        "pte": "executorch",
        "xnnpack": "executorch",
        "torch": "torchscript",
        "jit": "torchscript",
        "inductor": "aoti",
        "pt2": "aoti",
    }
)
"""Other names that targets go by."""


def targets() -> dict[str, str]:
    """The runtimes a plan can be made for, each with what it allows."""
    return {name: target.note for name, target in TARGETS.items()} | {"portable": ", ".join(PORTABLE)}


def resolve_targets(target: str | Sequence[str]) -> tuple[Target, ...]:
    """The rules of the named targets; a name that ends in .yaml or .yml is the path of a user's own.

    Raises:
        PlanError: A name is unknown, two names conflict, or a file cannot be used.
    """
    given = [target] if isinstance(target, str) else list(target)
    if not given:
        raise PlanError(f"found no target, wanted at least one of {', '.join(TARGETS)}")
    names = [name for item in given for name in (PORTABLE if item == "portable" else (item,))]
    engines: dict[str, str] = {}
    found = {name: _own_target(name) if is_target_file(name) else TARGETS.get(name) for name in names}
    _check_distinct([rule for rule in found.values() if rule is not None])
    for name in names:
        if is_target_file(name):
            continue
        if name not in TARGETS:
            known = ", ".join(TARGETS)
            raise PlanError(
                f"found the runtime {name!r}, wanted one of {known}, portable, or a .yaml file{_meant(name)}"
            )
        other = engines.setdefault(runtime_of(name), name)
        if other != name:
            rule = _conflict(TARGETS[other], TARGETS[name])
            raise PlanError(
                f"the targets {other} and {name} conflict ({rule}), and a runtime has one file; name one of them, "
                f"or {runtime_of(name)} for a file that is exact with every exact engine"
            )
    return tuple(rule for rule in found.values() if rule is not None)


def _meant(name: str) -> str:
    """The target that somebody has in mind who calls it by a file's or a format's name, or misspells it."""
    near = [MEANT[name.lower()]] if name.lower() in MEANT else difflib.get_close_matches(name, TARGETS, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _own_target(path: str) -> Target:
    """The rules that a user's file describes."""
    given = load_target_file(path)
    if runtime_of(given.name) in (*map(runtime_of, TARGETS), "portable"):
        raise PlanError(f"{path}: name: found {given.name!r}, which edgeqat knows already; choose another name")
    return Target(
        name=given.name,
        kinds=ALL_KINDS if given.ops is None else frozenset({*given.ops, Kind.QUANTIZE, Kind.DEQUANTIZE}),
        activation_bits=frozenset(given.activations.bits),
        weight_bits=frozenset(given.weights.bits),
        float_logits=given.float_logits,
        note=given.note,
        conv_dims=frozenset(given.conv_dims),
        pools_keep_grid=given.pools_keep_grid,
        symmetric_activations=given.activations.symmetric,
        power_of_two_activations=given.activations.power_of_two,
        per_channel_weights=given.weights.per_channel,
        power_of_two_weights=given.weights.power_of_two,
        storage=given.storage,
        file=path,
    )


def _check_distinct(rules: Sequence[Target]) -> None:
    """A target's name is that of the folder its artifact is written to."""
    files: dict[str, str] = {}
    for rule in rules:
        if files.setdefault(rule.name, rule.spelled) != rule.spelled:
            raise PlanError(f"{files[rule.name]} and {rule.spelled} have the name {rule.name!r}; rename one of them")


def _conflict(a: Target, b: Target) -> str:
    """The first rule in which two targets differ, in words."""
    if a.depthwise_limit != b.depthwise_limit:
        limits = [f"{t.name} {t.depthwise_limit or 'any'}" for t in (a, b)]
        return f"largest depthwise weight: {', '.join(limits)}"
    if a.counts_padding != b.counts_padding:
        return f"only {(a if a.counts_padding else b).name} counts padding in averages"
    return "they load with different engines"
