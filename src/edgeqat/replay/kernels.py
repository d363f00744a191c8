"""Which arithmetic the kernels of a runtime have on this machine."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from pathlib import Path

EXACT_ENGINES = ("fbgemm", "x86", "onednn", "qnnpack")
"""Engines of torch whose arithmetic is known exactly, the fastest on small models first."""

ENGINES = {
    "onnxruntime": ("CPUExecutionProvider",),
    "torchscript": EXACT_ENGINES,
    "executorch": ("xnnpack",),
    "litert": ("xnnpack", "builtin"),
    "openvino": ("CPU",),
    "aoti": ("inductor",),
}
"""By runtime: the engines that a manifest may name."""


def cpu_flags() -> frozenset[str]:
    """The processor's feature flags as Linux names them; empty where it does not tell."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return frozenset()
    for line in info.read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


def arithmetic_here(runtime: str) -> str | None:
    """The arithmetic of a runtime's kernels on this machine; None where it is not known exactly.

    Args:
        runtime: "onnxruntime", "torchscript", "openvino", or "RUNTIME/ENGINE"; without an engine, the first of
            the runtime's exact ones.
    """
    runtime, _, engine = runtime.partition("/")
    return KERNELS[runtime](engine) if runtime in KERNELS else None


def is_x86() -> bool:
    """Whether this is a 64-bit x86 machine."""
    return platform.machine() in ("x86_64", "AMD64")


def onnxruntime_here(engine: str) -> str | None:
    """Without VNNI, ONNX Runtime's kernels on x86 saturate; without AVX2 too, their sums are not known."""
    if platform.machine() in ("aarch64", "arm64", "ARM64"):
        return "onnxruntime/arm64"
    flags = cpu_flags() if is_x86() else frozenset()
    if flags & {"avx512_vnni", "avx_vnni"}:
        return "onnxruntime/x86"
    return "onnxruntime/x86-avx2" if "avx2" in flags else None


def torchscript_here(engine: str) -> str | None:
    """torch's engines have arithmetics of their own names."""
    # Sums saturate without VNNI, and torch's own additions depend on the width of its vectors.
    wide = "avx512_vnni" in cpu_flags() and os.environ.get("ATEN_CPU_CAPABILITY", "avx512") == "avx512"
    exact = [name for name in EXACT_ENGINES if is_x86() and (name == "qnnpack" or wide)]
    if not engine:
        return exact[0] if exact else None
    return engine if engine in exact else None


def executorch_here(engine: str) -> str | None:
    """XNNPACK's kernels compute alike on every x86."""
    return "xnnpack" if is_x86() and engine in ("", "xnnpack") else None


def litert_here(engine: str) -> str | None:
    """The delegate computes alike on every x86; LiteRT's own kernels were compared with AVX512 alone."""
    known = ("", "xnnpack", "builtin") if "avx512f" in cpu_flags() else ("", "xnnpack")
    return f"litert/{engine or 'xnnpack'}" if is_x86() and engine in known else None


def openvino_here(engine: str) -> str | None:
    """OpenVINO picks other kernels without AVX512-VNNI, and with AMX, which were not compared."""
    return "openvino/x86" if is_x86() and "avx512_vnni" in cpu_flags() and "amx_int8" not in cpu_flags() else None


def aoti_here(engine: str) -> str | None:
    """oneDNN's INT8 kernels were compared with AVX512-VNNI; all else in a package computes alike everywhere."""
    return "aoti" if is_x86() and "avx512_vnni" in cpu_flags() else None


KERNELS: dict[str, Callable[[str], str | None]] = {
    "onnxruntime": onnxruntime_here,
    "torchscript": torchscript_here,
    "executorch": executorch_here,
    "litert": litert_here,
    "openvino": openvino_here,
    "aoti": aoti_here,
}
"""By runtime: an engine to the arithmetic of its kernels here."""
