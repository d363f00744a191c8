"""What this machine is: processor, features that change integer kernels, installed versions."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

__all__ = ["Machine", "arithmetic_here", "describe_machine", "installed_runtimes"]

FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "asimddp", "i8mm", "sve")
"""Processor flags, as Linux names them, that select other integer kernels."""

RUNTIME_PACKAGES = {"onnxruntime": ("onnxruntime", "onnx", "onnxscript")}
"""What each runtime needs, the runtime itself first."""

REPORTED_PACKAGES = ("torch", "torchao", "numpy", "onnx", "onnxruntime", "onnxscript", "safetensors")


@dataclass(frozen=True)
class Machine:
    """A machine as the report names it."""

    cpu: str
    arch: str
    features: tuple[str, ...]
    threads: int
    versions: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**asdict(self), "features": list(self.features)}


@cache
def _processor() -> tuple[str, frozenset[str]]:
    """(model name, flags) from the kernel; only the architecture where it does not tell."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or platform.machine(), frozenset()
    fields: dict[str, str] = {}
    for line in info.read_text().splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    flags = fields.get("flags", fields.get("Features", ""))
    return fields.get("model name", platform.machine()), frozenset(flags.split())


def features() -> tuple[str, ...]:
    """The processor's features among those that matter here."""
    flags = _processor()[1]
    return tuple(name for name in FEATURES if name in flags)


def describe_machine(threads: int) -> Machine:
    """This machine, measured with that many threads."""
    versions = {"python": platform.python_version()}
    for package in REPORTED_PACKAGES:
        if importlib.util.find_spec(package) is not None:
            versions[package] = importlib.metadata.version(package)
    return Machine(_processor()[0], platform.machine(), features(), threads, versions)


def installed_runtimes() -> dict[str, str | None]:
    """Version of each runtime, None where it or a package it needs is not installed."""
    found: dict[str, str | None] = {}
    for runtime, packages in RUNTIME_PACKAGES.items():
        present = all(importlib.util.find_spec(package) is not None for package in packages)
        found[runtime] = importlib.metadata.version(packages[0]) if present else None
    return found


def arithmetic_here(runtime: str) -> str | None:
    """The name of the arithmetic that a runtime's kernels have on this machine; None where it is not known."""
    if runtime == "onnxruntime" and platform.machine() in ("x86_64", "AMD64"):
        vnni = {"avx512_vnni", "avx_vnni"} & set(features())
        return "onnxruntime/x86" if vnni else None
    return None
