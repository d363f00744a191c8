"""Artifact folders as files: manifest, hashes, tensors. Nothing in them is executed."""

from __future__ import annotations

import hashlib
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from edgeqat.replay.kernels import ENGINES

DTYPES = {"F16": "<f2", "F32": "<f4", "F64": "<f8", "I8": "i1", "I32": "<i4", "I64": "<i8", "U8": "u1", "BOOL": "?"}

UNSEALED = "0" * 64
"""Stands for a manifest's own hash while that is computed."""

MANIFEST_KEYS = {"sha256": str, "runtime": str, "engine": str, "model": str, "files": dict, "arithmetics": list}
MANIFEST_KEYS |= {"inputs": dict, "outputs": dict, "checks": list, "golden": dict}
"""What replaying reads of a manifest, with its JSON type."""


class FolderError(Exception):
    """An artifact folder that is incomplete, damaged or tampered with."""


def read_safetensors(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """The tensors of a safetensors file: a JSON header and raw bytes, nothing is executed."""
    try:
        raw = path.read_bytes()
        size = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + size])
        body = memoryview(raw)[8 + size :]
        return {
            name: np.frombuffer(body[slice(*entry["data_offsets"])], DTYPES[entry["dtype"]]).reshape(entry["shape"])
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FolderError(f"{path} cannot be read as safetensors ({error}); fetch the artifact again") from error


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an artifact folder."""
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FolderError(f"{path} cannot be read ({error}); wanted an artifact folder made by edgeqat") from error
    if not isinstance(manifest, dict):
        raise FolderError(f"{path} holds no JSON object; wanted a manifest made by edgeqat")
    lacking = [name for name, kind in MANIFEST_KEYS.items() if not isinstance(manifest.get(name), kind)]
    if lacking:
        raise FolderError(f"{path} lacks {', '.join(lacking)}; wanted a manifest made by edgeqat")
    runtime, engine = manifest["runtime"], manifest["engine"]
    wanted = {"schema": (1,), "runtime": tuple(ENGINES), "engine": ENGINES.get(runtime, (engine,))}
    for key, values in wanted.items():
        if manifest.get(key) not in values:
            names = " or ".join(map(str, values))
            raise FolderError(f"{path} has the {key} {manifest.get(key)!r}, wanted {names}; fetch the artifact again")
    for key in ("arithmetics", "inputs", "outputs"):
        if not manifest[key]:
            raise FolderError(f"{path} names no {key}, wanted at least one; fetch the artifact again")
    for name in (manifest["model"], *manifest["files"]):
        if Path(name).name != name:
            raise FolderError(f"{path} names the file {name!r}, which is outside the folder; fetch the artifact again")
    return manifest


def outputs_in_order(manifest: dict[str, Any]) -> list[str]:
    """The name of every output of the model file; one that the model returns twice is there twice."""
    # Folders written before this was kept have no value that is returned twice.
    return [str(row["output"]) for row in manifest.get("returns", [])] or list(manifest["outputs"])


def seal_of(text: bytes, written: str) -> str:
    """A manifest's own hash: of its file, with the hash that is written in it blanked."""
    return hashlib.sha256(text.replace(written.encode(), UNSEALED.encode())).hexdigest()


def check_hashes(folder: Path, manifest: dict[str, Any]) -> None:
    """Raises FolderError for the first file that is missing or is not the one the manifest was written for."""
    path = folder / "manifest.json"
    if seal_of(path.read_bytes(), manifest["sha256"]) != manifest["sha256"]:
        raise FolderError(
            f"{path} does not match its own sha256: it was changed or damaged; fetch the artifact again, or pass "
            "--no-hash to see what the model computes"
        )
    for name in sorted({manifest["model"], "golden.safetensors", *manifest["files"]}):
        path, entry = folder / name, manifest["files"].get(name)
        if not isinstance(entry, dict) or not isinstance(entry.get("sha256"), str):
            raise FolderError(f"{folder / 'manifest.json'} has no sha256 of {name}; fetch the artifact again")
        if not path.is_file():
            raise FolderError(f"{path} is missing; fetch the artifact again")
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != entry["sha256"]:
            raise FolderError(
                f"{path} has sha256 {found[:12]}..., the manifest says {entry['sha256'][:12]}...: it was changed "
                "or damaged; fetch the artifact again, or pass --no-hash to see what it computes"
            )


def checksums(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """CRC-32 of each sample's bytes: int64 [N]."""
    return np.array([zlib.crc32(np.ascontiguousarray(sample).tobytes()) for sample in array], np.int64)


def reason_of(error: Exception) -> str:
    """The line of a runtime's message that says what is wrong; TorchScript puts a traceback before it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    marked = [line.removeprefix("RuntimeError: ") for line in lines if line.startswith("RuntimeError: ")]
    return marked[-1] if marked else lines[0]
