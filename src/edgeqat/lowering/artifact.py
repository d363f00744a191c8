"""Artifact folders: the model file, its manifest, its golden vectors, and the script that verifies it anywhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from edgeqat.errors import TamperedError
from edgeqat.lowering.onnx_session import OnnxSession
from edgeqat.replay import FolderError, check_hashes, read_manifest
from edgeqat.signature import Batch, Signature

__all__ = ["Artifact", "load_artifact"]


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

    def run(self, inputs: Batch, threads: int = 1) -> Any:
        """Runs a batch on the real runtime; returns the model's own output structure.

        A folder loaded from disk does not know that structure: it returns a tuple of outputs.
        """
        outputs = self.session(threads).run(self.flat_inputs(inputs))
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
