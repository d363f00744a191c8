"""What this machine is: processor, features that change integer kernels, installed versions."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# The stand-alone verifier needs these too and can import nothing, so they live there.
from edgeqat.replay.kernels import arithmetic_here, cpu_flags

__all__ = [
    "Machine",
    "arithmetic_here",
    "available_memory",
    "cpp_compiler",
    "describe_machine",
    "installed_runtimes",
]

FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "asimddp", "i8mm", "sve")
"""Processor flags, as Linux names them, that select other integer kernels."""

RUNTIME_PACKAGES = {
    "onnxruntime": ("onnxruntime", "onnx", "onnxscript"),
    "torchscript": ("torch",),
    "executorch": ("executorch",),
    "litert": ("ai_edge_litert", "flatbuffers"),
    "openvino": ("openvino", "onnx", "onnxscript"),
    "aoti": ("torch",),
}
"""What each runtime needs, the runtime itself first."""

REPORTED_PACKAGES = (
    "torch",
    "torchao",
    "numpy",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "executorch",
    "ai_edge_litert",
    "litert_torch",
    "openvino",
    "safetensors",
)


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


def _cpu_name() -> str:
    """The processor's name, as far as the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def features() -> tuple[str, ...]:
    """The processor's features among those that matter here."""
    flags = cpu_flags()
    return tuple(name for name in FEATURES if name in flags)


def describe_machine(threads: int) -> Machine:
    """This machine, measured with that many threads."""
    versions = {"python": platform.python_version()}
    for package in REPORTED_PACKAGES:
        if importlib.util.find_spec(package) is not None:
            versions[package] = importlib.metadata.version(package)
    return Machine(_cpu_name(), platform.machine(), features(), threads, versions)


def installed_runtimes() -> dict[str, str | None]:
    """Version of each runtime, None where it or a package it needs is not installed.

    A C++ compiler, which making files for "aoti" takes and running them does not, is no package.
    """
    found: dict[str, str | None] = {}
    for runtime, packages in RUNTIME_PACKAGES.items():
        present = all(importlib.util.find_spec(package) is not None for package in packages)
        found[runtime] = importlib.metadata.version(packages[0]) if present else None
    return found


def cpp_compiler() -> str | None:
    """The C++ compiler that torch would take; None where there is none."""
    return shutil.which(os.environ.get("CXX") or ("clang++" if platform.system() == "Darwin" else "g++"))


def available_memory() -> int | None:
    """Bytes that can be allocated without swapping; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = [int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return found[0] * 1024 if found else None
