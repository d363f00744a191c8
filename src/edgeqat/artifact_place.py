"""Where an artifact folder is wanted: what else may be there, and where the folders are that were meant."""

from __future__ import annotations

from pathlib import Path

from edgeqat.errors import InputError

__all__ = ["check_artifact_place"]

MANIFEST = "manifest.json"
BELOW = (f"*/{MANIFEST}", f"*/*/{MANIFEST}", f"artifacts/*/*/{MANIFEST}")
"""Where a folder of artifacts, one of variants and a run's directory have them."""
NAMED = 6


def check_artifact_place(folder: Path) -> None:
    """Refuses what is no artifact folder; those below it are named.

    Raises:
        InputError: It has no manifest.
    """
    try:
        if (folder / MANIFEST).exists():
            return
        below = sorted({str(path.parent) for pattern in BELOW for path in folder.glob(pattern)})
    except OSError:  # whoever reads it says why it cannot be read
        return
    found = "is a file" if folder.is_file() else f"has no {MANIFEST}" if folder.is_dir() else "does not exist"
    hint = "; edgeqat.lower and edgeqat run write them"
    if below:
        hint = f"; below it are {', '.join(below[:NAMED])}" + f" and {len(below) - NAMED} more" * (len(below) > NAMED)
    raise InputError(f"{folder} {found}, wanted an artifact folder{hint}")
