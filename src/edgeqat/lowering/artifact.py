"""Artifact folders: the model file, its manifest, its golden vectors, and the script that verifies it anywhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from edgeqat.artifact_place import check_artifact_place
from edgeqat.errors import InputError, OutputError, TamperedError
from edgeqat.lowering.session import Session, open_session
from edgeqat.replay.compare import choose_engine
from edgeqat.replay.folder import FolderError, check_hashes, read_manifest, read_safetensors
from edgeqat.replay.kernels import arithmetic_here
from edgeqat.signature import Batch, Signature

__all__ = ["Artifact", "check_replaceable", "load_artifact"]


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
    _sessions: dict[tuple[str, int], Session] = field(default_factory=dict, repr=False)

    def __repr__(self) -> str:
        """One line: the manifest would fill a page."""
        return f"Artifact({str(self.path)!r}, runtime={self.runtime!r}, engine={str(self.manifest['engine'])!r})"

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

    @property
    def engine(self) -> str:
        """The engine that it runs on here: the manifest's, or another exact one where this machine lacks it."""
        return choose_engine(dict(self.manifest))[0]

    def session(self, threads: int = 1, engine: str | None = None) -> Session:
        """A loaded session with that many threads, made once.

        Args:
            threads: Threads within an op.
            engine: Another engine than the artifact's own, of those that its runtime has.
        """
        chosen = self.engine if engine is None else engine
        if (chosen, threads) not in self._sessions:
            taps = read_safetensors(self.folder / "golden.safetensors")["taps"].tobytes()
            self._sessions[chosen, threads] = open_session(self.runtime, self.path, chosen, threads, taps)
        return self._sessions[chosen, threads]

    def arithmetic(self, engine: str | None = None) -> str | None:
        """The arithmetic of its kernels on this machine, None where it is not known exactly."""
        if self.manifest.get("storage") == "int8":  # ONNX Runtime computes such layers in float
            return None
        if self.runtime == "onnxruntime":
            return arithmetic_here(self.runtime)
        return arithmetic_here(f"{self.runtime}/{self.engine if engine is None else engine}")

    def flat_inputs(self, inputs: Batch) -> list[Tensor]:
        """The input tensors in the model file's order.

        Raises:
            InputError: They are not what the file takes.
        """
        if self.signature is not None:
            return self.signature.flatten(inputs)
        if isinstance(inputs, dict):
            flat = [inputs[name] for name in self.manifest["inputs"]]
        else:
            flat = list(inputs) if isinstance(inputs, tuple) else [inputs]
        for tensor, (name, entry) in zip(flat, self.manifest["inputs"].items(), strict=False):
            wanted, found = entry["dtype"], str(tensor.dtype).removeprefix("torch.")
            if found != wanted and "uint8" in (found, wanted):
                raise InputError(f"input {name!r} is {found}, wanted {wanted} {entry['shape']}")
        return flat

    def run(self, inputs: Batch, threads: int = 1) -> Any:
        """Runs a batch on the real runtime; returns the model's own output structure.

        A folder loaded from disk does not know that structure: it returns a tuple of outputs.
        """
        outputs = self.session(threads).run(self.flat_inputs(inputs))
        return tuple(outputs) if self.signature is None else self.signature.unflatten(outputs)


def load_artifact(folder: str | Path, check: bool = True) -> Artifact:
    """An artifact folder from disk.

    Raises:
        InputError: It is no artifact folder.
        TamperedError: A file is missing, unreadable, or does not match its hash.
    """
    folder = Path(folder)
    check_artifact_place(folder)
    try:
        manifest = read_manifest(folder)
        if check:
            check_hashes(folder, manifest)
    except FolderError as error:
        raise TamperedError(str(error)) from error
    return Artifact(folder, manifest)


def check_replaceable(folder: Path) -> None:
    """Refuses a place for an artifact folder at which something else would be lost; touches nothing.

    Raises:
        OutputError: It is a file, the working directory or one that holds it, or a folder that is neither empty nor
            an artifact folder and nothing besides.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise OutputError(f"cannot write {folder}: it is a file, wanted a folder; choose another place")
    if Path.cwd().is_relative_to(folder.resolve()):
        raise OutputError(
            f"cannot write {folder}: an artifact folder is replaced whole, and this one holds the working directory; "
            "name a folder inside it"
        )
    entries = sorted(path.name for path in folder.iterdir())
    if not entries:
        return
    try:
        own = {"manifest.json", *read_manifest(folder)["files"]}
    except FolderError:
        own = set()
    foreign = [name for name in entries if name not in own or not (folder / name).is_file()]
    if foreign:
        raise OutputError(
            f"cannot write {folder}: it holds {foreign[0]} ({len(foreign)} such in all), which edgeqat did not write; "
            "choose another place"
        )
