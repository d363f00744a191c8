"""The arithmetics that are known exactly, by name."""

from __future__ import annotations

from collections.abc import Mapping

from edgeqat.errors import InputError
from edgeqat.interpreter.arithmetic.aoti import Aoti
from edgeqat.interpreter.arithmetic.base import Arithmetic
from edgeqat.interpreter.arithmetic.litert import LiteRTBuiltin, LiteRTXnnpack
from edgeqat.interpreter.arithmetic.onnxruntime import OnnxRuntimeX86, OnnxRuntimeX86Avx2
from edgeqat.interpreter.arithmetic.onnxruntime_arm import OnnxRuntimeArm64
from edgeqat.interpreter.arithmetic.openvino import OpenVinoX86
from edgeqat.interpreter.arithmetic.torchscript import X86, Fbgemm, Onednn, Qnnpack
from edgeqat.interpreter.arithmetic.xnnpack import Xnnpack
from edgeqat.machine import arithmetic_here

__all__ = ["ARITHMETICS", "Arithmetic", "resolve_arithmetic"]

_KNOWN: tuple[Arithmetic, ...] = (
    OnnxRuntimeX86(),
    OnnxRuntimeX86Avx2(),
    OnnxRuntimeArm64(),
    Fbgemm(),
    Onednn(),
    X86(),
    Qnnpack(),
    Xnnpack(),
    LiteRTXnnpack(),
    LiteRTBuiltin(),
    OpenVinoX86(),
    Aoti(),
)

ARITHMETICS: Mapping[str, Arithmetic] = {a.name: a for a in _KNOWN}


def resolve_arithmetic(name: str) -> Arithmetic:
    """The arithmetic of that name, or of the runtime of that name on this machine.

    Raises:
        InputError: The name is unknown, or the runtime's kernels on this machine have no known arithmetic.
    """
    if name in ARITHMETICS:
        return ARITHMETICS[name]
    here = arithmetic_here(name)
    if here is not None and here in ARITHMETICS:
        return ARITHMETICS[here]
    known = ", ".join(ARITHMETICS)
    raise InputError(f"found the arithmetic {name!r}, wanted one of {known}, or a runtime whose kernels here have one")
