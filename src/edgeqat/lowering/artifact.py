"""Artifact folders: the model file, its manifest, its golden vectors, and the script that verifies it anywhere."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from edgeqat.errors import OutputError, TamperedError
from edgeqat.lowering.onnx_session import OnnxSession
from edgeqat.program import Batch, Signature
from edgeqat.replay import FolderError, check_hashes, read_manifest

__all__ = ["Artifact", "load_artifact", "replace_folder", "write_atomically"]


@dataclass(frozen=True, eq=False)
class Artifact:
    """A lowered model on disk.

    Attributes:
        folder: Holds the model file, manifest.json, golden.safetensors and verify.py.
        manifest: What manifest.json says.
        signature: How the model is called; None for a folder loaded from disk, which is then called with its
            inputs by position or name and returns a tuple.
    """

    folder: Path
    manifest: Mapping[str, Any]
    signature: Signature | None = None
    _sessions: dict[int, OnnxSession] = field(default_factory=dict, repr=False)

    @property
    def path(self) -> Path:
        """The model file."""
        return self.folder / str(self.manifest["model"])

    @property
    def runtime(self) -> str:
        """Name of the runtime it was lowered for."""
        return str(self.manifest["runtime"])

    @property
    def file_bytes(self) -> int:
        """Size of the model file."""
        return self.path.stat().st_size

    def session(self, threads: int = 1) -> OnnxSession:
        """A loaded session with that many threads, made once."""
        if threads not in self._sessions:
            self._sessions[threads] = OnnxSession(self.path.read_bytes(), threads)
        return self._sessions[threads]

    def flat_inputs(self, inputs: Batch) -> list[Tensor]:
        """The input tensors in the model file's order."""
        if self.signature is not None:
            return self.signature.flatten(inputs)
        if isinstance(inputs, dict):
            return [inputs[name] for name in self.manifest["inputs"]]
        return list(inputs) if isinstance(inputs, tuple) else [inputs]

    def run(self, inputs: Batch) -> Any:
        """Runs a batch on the real runtime, one thread; returns the model's own output structure."""
        outputs = self.session().run(self.flat_inputs(inputs))
        return tuple(outputs) if self.signature is None else self.signature.unflatten(outputs)


def load_artifact(folder: Path, check: bool = True) -> Artifact:
    """An artifact folder from disk.

    Raises:
        TamperedError: A file is missing, unreadable, or does not match its hash.
    """
    try:
        manifest = read_manifest(folder)
        if check:
            check_hashes(folder, manifest)
    except FolderError as error:
        raise TamperedError(str(error)) from error
    return Artifact(folder, manifest)


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_atomically(path: Path, data: bytes | str) -> None:
    """Writes a file so that a reader sees the old one or the new one, whole.

    Raises:
        OutputError: It cannot be written; what was there is untouched.
    """
    raw = data.encode() if isinstance(data, str) else data
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes private files; an artifact is as readable as any other file.
        Path(temporary).chmod(0o666 & ~_umask())
        Path(temporary).replace(path)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise OutputError(
            f"cannot write {path}: {error.strerror or error}; choose another place or free space"
        ) from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextmanager
def replace_folder(folder: Path) -> Iterator[Path]:
    """A new folder to write into, which takes the place of `folder` when all went well, and only then.

    Raises:
        OutputError: It cannot be written.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    except OSError as error:
        raise OutputError(f"cannot write {folder}: {error.strerror or error}; choose another place") from error
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())
        if folder.exists():
            shutil.rmtree(folder)
        temporary.replace(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def to_json(data: Any) -> str:
    """JSON as it is written to disk: sorted where order means nothing, readable, newline at the end."""
    return json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
