"""What each runtime allows: the rules a plan must satisfy.

A target is a runtime, or a runtime and one of its engines, "torchscript/qnnpack". A runtime's plain name stands for
every engine of it whose arithmetic is known exactly, and so one file for all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from edgeqat.errors import PlanError
from edgeqat.program import Kind

__all__ = ["TARGETS", "Target", "engine_of", "resolve_targets", "runtime_of", "targets"]


@dataclass(frozen=True)
class Target:
    """The rules of one runtime.

    Attributes:
        name: The runtime's name, with its engine where it is one engine's rules.
        kinds: Integer ops it has kernels for.
        activation_bits: Widths of activation grids its kernels clamp to.
        weight_bits: Widths of weight grids it can store.
        float_logits: Whether a linear layer that ends the network gives float straight from its accumulator.
        note: One line for `targets()`.
        conv_dims: Numbers of spatial dimensions of a conv that its kernels compute exactly.
        pools_keep_grid: Whether an average pool's output is on its input's grid.
        depthwise_limit: Largest |weight| of a depthwise conv that its kernels compute exactly; None for any.
        counts_padding: Whether an average pool counts what it pads with, whatever `count_include_pad` says.
        broadcasts: Whether operands of additions and products may differ in shape.
        open_sizes: Whether one file takes images of any height and width.
    """

    name: str
    kinds: frozenset[Kind]
    activation_bits: frozenset[int]
    weight_bits: frozenset[int]
    float_logits: bool
    note: str
    conv_dims: frozenset[int] = frozenset({1, 2, 3})
    pools_keep_grid: bool = False
    depthwise_limit: int | None = None
    counts_padding: bool = False
    broadcasts: bool = True
    open_sizes: bool = True


ALL_KINDS = frozenset(Kind) - {Kind.FLOAT}

TORCH_KINDS = ALL_KINDS - {Kind.CONV_TRANSPOSE, Kind.MATMUL, Kind.EXPAND}
"""Kinds whose arithmetic in torch's INT8 kernels is known exactly."""

# Integer kernels clamp to the storage type, so a narrower activation would need a clip of its own.
UINT8_ACTIVATIONS = frozenset({8})
INT8_WEIGHTS = frozenset(range(2, 9))

TORCH_CONV_DIMS = frozenset({1, 2})
"""conv3d is off by a step in up to three of a hundred random ops with onednn, x86 and qnnpack."""

FBGEMM_DEPTHWISE_LIMIT = 63
"""255 * (63 + 63) fits the 16 bits in which fbgemm's depthwise kernels add pairs of products."""


def _torch_int8(name: str, note: str, depthwise_limit: int | None, counts_padding: bool) -> Target:
    return Target(
        name=name,
        kinds=TORCH_KINDS,
        activation_bits=UINT8_ACTIVATIONS,
        weight_bits=INT8_WEIGHTS,
        float_logits=False,
        note=note,
        conv_dims=TORCH_CONV_DIMS,
        pools_keep_grid=True,
        depthwise_limit=depthwise_limit,
        counts_padding=counts_padding,
        broadcasts=False,
        open_sizes=False,
    )


TARGETS: Mapping[str, Target] = {
    target.name: target
    for target in (
        Target(
            name="onnxruntime",
            kinds=ALL_KINDS,
            activation_bits=UINT8_ACTIVATIONS,
            weight_bits=INT8_WEIGHTS,
            float_logits=True,
            note="uint8 activations, int8 weights per channel, int32 biases, QDQ form",
        ),
        _torch_int8(
            "torchscript",
            "torch's INT8 kernels; one file that is exact with every engine",
            FBGEMM_DEPTHWISE_LIMIT,
            True,
        ),
        _torch_int8("torchscript/fbgemm", "exact on x86 with AVX512-VNNI", FBGEMM_DEPTHWISE_LIMIT, False),
        _torch_int8("torchscript/onednn", "exact on x86 with AVX512-VNNI; full-range depthwise weights", None, False),
        _torch_int8("torchscript/x86", "onednn, but fbgemm above 100 groups", FBGEMM_DEPTHWISE_LIMIT, False),
        _torch_int8("torchscript/qnnpack", "exact on any x86; full-range depthwise weights", None, True),
    )
}

PORTABLE = ("onnxruntime", "torchscript")
"""The target "portable": every runtime whose arithmetic is known exactly."""

PLANNED = ("executorch", "openvino", "litert", "aoti")


def targets() -> dict[str, str]:
    """The runtimes a plan can be made for, each with what it allows."""
    return {name: target.note for name, target in TARGETS.items()} | {"portable": " and ".join(PORTABLE)}


def runtime_of(target: str) -> str:
    """The runtime of a target: "torchscript" of "torchscript/qnnpack"."""
    return target.partition("/")[0]


def engine_of(target: str) -> str | None:
    """The engine of a target, None where it names none."""
    return target.partition("/")[2] or None


def resolve_targets(target: str | Sequence[str]) -> tuple[Target, ...]:
    """The rules of the named targets.

    Raises:
        PlanError: A name is unknown, its runtime is not supported yet, or two names conflict.
    """
    given = [target] if isinstance(target, str) else list(target)
    if not given:
        raise PlanError(f"found no target, wanted at least one of {', '.join(TARGETS)}")
    names = [name for item in given for name in (PORTABLE if item == "portable" else (item,))]
    engines: dict[str, str] = {}
    for name in names:
        if runtime_of(name) in PLANNED:
            raise PlanError(f"the runtime {name!r} is not supported yet; supported: {', '.join(TARGETS)}")
        if name not in TARGETS:
            raise PlanError(f"found the runtime {name!r}, wanted one of {', '.join(TARGETS)}, portable")
        other = engines.setdefault(runtime_of(name), name)
        if other != name:
            rule = _conflict(TARGETS[other], TARGETS[name])
            raise PlanError(
                f"the targets {other} and {name} conflict ({rule}), and a runtime has one file; name one of them, "
                f"or {runtime_of(name)} for a file that is exact with every exact engine"
            )
    return tuple(TARGETS[name] for name in dict.fromkeys(names))


def _conflict(a: Target, b: Target) -> str:
    """The first rule in which two targets differ, in words."""
    if a.depthwise_limit != b.depthwise_limit:
        limits = [f"{t.name} {t.depthwise_limit or 'any'}" for t in (a, b)]
        return f"largest depthwise weight: {', '.join(limits)}"
    if a.counts_padding != b.counts_padding:
        return f"only {(a if a.counts_padding else b).name} counts padding in averages"
    return "they load with different engines"
