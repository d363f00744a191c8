"""The output directory of a run: taken only when it is free, replaced only when that was asked for."""

from __future__ import annotations

import shutil
from pathlib import Path

from edgeqat.errors import OutputError

__all__ = ["check_free", "claim"]

OWN_NAMES = frozenset({"recipe.yaml", "report.json", "report.html", "checkpoints", "artifacts", "latency"})
"""What a run writes into its directory; only a directory that holds nothing else is ever replaced."""


def check_free(folder: Path, overwrite: bool) -> None:
    """Checks, without touching it, that a run may be written to `folder`.

    Raises:
        OutputError: It is a file, holds another run (and `overwrite` is off), or holds something else.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise OutputError(f"{folder} is a file, wanted a directory for the run")
    entries = {path.name for path in folder.iterdir()}
    if not entries:
        return
    # A killed run may leave a temporary file, named .report.json.abc123 after the one it was to become.
    foreign = sorted(n for n in entries if n not in OWN_NAMES and not n.startswith(tuple(f".{o}." for o in OWN_NAMES)))
    if foreign or "recipe.yaml" not in entries:
        found = f", such as {foreign[0]}" if foreign else ""
        raise OutputError(f"{folder} holds files that are no edgeqat run{found}; choose another directory")
    if not overwrite:
        state = "a finished run" if "report.json" in entries else "an unfinished run"
        raise OutputError(f"{folder} holds {state}; pass --overwrite to replace it, or choose another directory")


def claim(folder: Path, overwrite: bool) -> None:
    """Makes `folder` an empty directory.

    Raises:
        OutputError: It cannot be made.
    """
    check_free(folder, overwrite)
    try:
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
    except OSError as error:
        raise OutputError(f"cannot make the directory {folder}: {error.strerror}; choose another place") from error
