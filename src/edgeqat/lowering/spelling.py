"""What a lowering makes of a program, before it is an artifact folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from edgeqat.program import QuantizedProgram

__all__ = ["Spelling", "payload_bytes"]


@dataclass(frozen=True)
class Spelling:
    """A program as one runtime takes it.

    Attributes:
        file_name: Name of the model file.
        data: Its bytes; the same program gives the same, but for compiled code.
        engine: What runs it unless something else is asked for.
        arithmetics: Those whose integers it computes, that of `engine` first where there is one.
        payload_bytes: Weights and biases alone.
        runtime_ops: How often each op occurs in the graph that really runs.
        taps: How the inner tensors of the file are made visible; the runtime's session knows what it means.
        unseen: Values with a grid whose integers the runtime never makes, never shows, or makes only where nobody
            looks.
    """

    file_name: str
    data: bytes
    engine: str
    arithmetics: tuple[str, ...]
    payload_bytes: int
    runtime_ops: Mapping[str, int]
    taps: bytes
    unseen: frozenset[str] = frozenset()


def payload_bytes(program: QuantizedProgram) -> int:
    """Bytes of weights and biases: int8 and float32 where quantized, as they are in float islands."""
    total = sum(const.data.numel() for const in program.consts.values() if const.data is not None)
    for op in program.ops:
        if op.bias is not None:
            total += 4 * op.bias.numel()
        if op.body is not None:
            total += sum(p.numel() * p.element_size() for p in op.body.parameters())
    return total
