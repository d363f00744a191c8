"""What each runtime allows: the rules a plan must satisfy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from edgeqat.errors import PlanError
from edgeqat.program import Kind

__all__ = ["TARGETS", "Target", "resolve_targets", "targets"]


@dataclass(frozen=True)
class Target:
    """The rules of one runtime.

    Attributes:
        name: The runtime's name.
        kinds: Integer ops it has kernels for.
        activation_bits: Widths of activation grids its kernels clamp to.
        weight_bits: Widths of weight grids it can store.
        float_logits: Whether a linear layer that ends the network gives float straight from its accumulator.
        note: One line for `targets()`.
    """

    name: str
    kinds: frozenset[Kind]
    activation_bits: frozenset[int]
    weight_bits: frozenset[int]
    float_logits: bool
    note: str


TARGETS: Mapping[str, Target] = {
    "onnxruntime": Target(
        name="onnxruntime",
        kinds=frozenset(Kind) - {Kind.FLOAT},
        # Its integer kernels clamp to the storage type, so a narrower activation would need a clip of its own.
        activation_bits=frozenset({8}),
        weight_bits=frozenset(range(2, 9)),
        float_logits=True,
        note="uint8 activations, int8 weights per channel, int32 biases, QDQ form",
    ),
}

PLANNED = ("torchscript", "executorch", "openvino", "litert", "aoti", "portable")


def targets() -> dict[str, str]:
    """The runtimes a plan can be made for, each with what it allows."""
    return {name: target.note for name, target in TARGETS.items()}


def resolve_targets(target: str | Sequence[str]) -> tuple[Target, ...]:
    """The rules of the named runtimes.

    Raises:
        PlanError: A name is unknown, or its runtime is not supported yet.
    """
    names = [target] if isinstance(target, str) else list(target)
    if not names:
        raise PlanError(f"found no target, wanted at least one of {', '.join(TARGETS)}")
    for name in names:
        if name in PLANNED:
            raise PlanError(f"the runtime {name!r} is not supported yet; supported: {', '.join(TARGETS)}")
        if name not in TARGETS:
            raise PlanError(f"found the runtime {name!r}, wanted one of {', '.join(TARGETS)}")
    return tuple(TARGETS[name] for name in dict.fromkeys(names))
