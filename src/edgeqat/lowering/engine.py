"""Which of torch's engines a TorchScript file is to run on, where the user names none."""

from __future__ import annotations

import math

import torch

from edgeqat.op_attrs import ConvAttrs
from edgeqat.program import QuantizedProgram
from edgeqat.replay.kernels import EXACT_ENGINES, arithmetic_here

__all__ = ["fastest_engine", "mean_macs"]

X86_FROM = 800_000
"""Multiply-adds an op from which x86's quicker kernels outweigh its larger cost of a call: fbgemm is faster with
0.3 and 0.5 million, x86 with 1.1 and more, see docs/design.md; measured by benchmarks/torchscript.py."""


def fastest_engine(program: QuantizedProgram) -> str:
    """The engine expected to be fastest among those whose arithmetic is known exactly here, else torch's own choice.

    A rule and not a measurement, so that the same program gives the same file.
    """
    supported = torch.backends.quantized.supported_engines
    exact = [e for e in EXACT_ENGINES if e in supported and arithmetic_here(f"torchscript/{e}") is not None]
    if not exact:
        return str(torch.backends.quantized.engine)
    return "x86" if "x86" in exact and mean_macs(program) >= X86_FROM else exact[0]


def mean_macs(program: QuantizedProgram) -> float:
    """Multiply-adds of one sample in a quantized conv or linear op, on average; 0 if there is none."""
    counts = []
    for op in program.ops:
        if op.weight is None or program.values[op.name].grid is None:
            continue
        kernel, shape = program.consts[op.weight].data, program.values[op.name].shape
        assert kernel is not None
        # A kernel is [out, in / groups, ...]: each output element is the sum of one row of it.
        sizes = shape[2:] if isinstance(op.attrs, ConvAttrs) else shape[1:-1]
        positions = math.prod(size for size in sizes if isinstance(size, int))
        counts.append(positions * kernel.numel())
    return sum(counts) / len(counts) if counts else 0.0
