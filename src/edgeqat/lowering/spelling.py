"""What a lowering makes of a program, before it is an artifact folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["Spelling"]


@dataclass(frozen=True)
class Spelling:
    """A program as one runtime takes it.

    Attributes:
        file_name: Name of the model file.
        data: Its bytes; the same program gives the same.
        engine: What runs it unless something else is asked for.
        arithmetics: Those whose integers it computes, that of `engine` first where there is one.
        payload_bytes: Weights and biases alone.
        runtime_ops: How often each op occurs in the graph that really runs.
        taps: How the inner tensors of the file are made visible; the runtime's session knows what it means.
        unseen: Values with a grid whose integers the runtime never makes, or makes only where nobody looks.
    """

    file_name: str
    data: bytes
    engine: str
    arithmetics: tuple[str, ...]
    payload_bytes: int
    runtime_ops: Mapping[str, int]
    taps: bytes
    unseen: frozenset[str] = frozenset()
