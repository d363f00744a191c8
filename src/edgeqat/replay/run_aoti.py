"""Running AOTInductor packages: compiled code, which is loaded into the process; check its hash first."""

from __future__ import annotations

import json
import platform
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgeqat.replay.folder import FolderError, reason_of
from edgeqat.replay.kernels import cpu_flags
from edgeqat.replay.runner import Call

FLAG_OF = {"avx512": "avx512f"}
"""Inductor's names of instruction sets, where the processor's flag is another."""


def run(
    path: Path, engine: str, feed: dict[str, Any], outputs: list[str], taps: bytes
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Every output by name; nothing inside can be looked at; one thread."""
    import torch

    package = load_aoti(path)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        found = package.boxed_run([torch.from_numpy(array.copy()) for array in feed.values()])
    except RuntimeError as error:
        raise FolderError(f"AOTInductor refuses the model: {reason_of(error)}") from error
    finally:
        torch.set_num_threads(threads)
    return {name: tensor.numpy() for name, tensor in zip(outputs, found, strict=True)}, {}


def start(engine: str, threads: int) -> Callable[[Path, dict[str, Any]], Call]:
    """Imports torch and sets its threads; returns what makes a call of a model file and its inputs."""
    import torch

    torch.set_num_threads(threads)

    def load(model: Path, feed: dict[str, Any]) -> Call:
        package = load_aoti(model)
        inputs = [torch.from_numpy(array) for array in feed.values()]
        return lambda: package.boxed_run(list(inputs))

    return load


def load_aoti(path: Path) -> Any:
    """An AOTInductor package, loaded with what inductor itself loads them with; importing inductor takes seconds.

    Raises:
        FolderError: It cannot be read, or was compiled for another processor.
    """
    import torch

    wanted = instructions_of(path)
    missing = sorted(wanted - {platform.machine(), *cpu_flags()})
    if missing:
        raise FolderError(f"{path} was compiled for a processor with {', '.join(missing)}; lower it on this one")
    try:
        return torch._C._aoti.AOTIModelPackageLoader(str(path), "model", False, 1, -1)
    except RuntimeError as error:
        raise FolderError(f"{path} cannot be loaded ({reason_of(error)}); fetch the artifact again") from error


def instructions_of(path: Path) -> set[str]:
    """The machine and the processor flags that a package was compiled for.

    Raises:
        FolderError: It cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as package:
            (name,) = (entry for entry in package.namelist() if entry.endswith("wrapper_metadata.json"))
            found = json.loads(package.read(name))
        sets = [word.lower() for word in found["AOTI_CPU_ISA"].split()]
        return {str(found["AOTI_MACHINE"]), *(FLAG_OF.get(word, word) for word in sets)}
    except (zipfile.BadZipFile, ValueError, LookupError) as error:
        raise FolderError(
            f"{path} cannot be read as an AOTInductor package ({reason_of(error)}); fetch the artifact again"
        ) from error
