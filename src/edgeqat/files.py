"""Writing files so that nothing is ever half there."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edgeqat.errors import OutputError

__all__ = ["replace_folder", "sha256_of", "to_json", "write_atomically"]


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
    except BaseException as error:  # an interrupt too leaves nothing behind
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
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
        _swap(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _swap(temporary: Path, folder: Path) -> None:
    """Puts one folder in the place of another, which is removed only once the new one stands there."""
    aside = temporary.with_name(f"{temporary.name}.old")
    try:
        temporary.chmod(0o777 & ~_umask())
        if folder.exists():
            if not folder.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
            folder.replace(aside)
        try:
            temporary.replace(folder)
        except BaseException:  # an interrupt too leaves the old one where it was
            if aside.exists() and not folder.exists():
                aside.replace(folder)
            raise
    except OSError as error:
        raise OutputError(f"cannot replace {folder}: {error.strerror or error}; choose another place") from error
    shutil.rmtree(aside, ignore_errors=True)


def to_json(data: Any) -> str:
    """JSON as it is written to disk: sorted where order means nothing, readable, newline at the end."""
    return json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
