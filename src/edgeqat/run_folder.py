"""The output directory of a run: taken by one process at a time, replaced only when that was asked for.

While a run writes, it holds an OS lock on `.edgeqat-lock` in the directory; a killed process releases it by itself,
and the file that stays then says that what lies beside it is ours.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from types import ModuleType

from edgeqat.errors import OutputError

fcntl: ModuleType | None
try:
    fcntl = importlib.import_module("fcntl")
except ImportError:  # not a POSIX system: two runs into one directory are then not told apart
    fcntl = None

__all__ = ["FolderState", "check_free", "check_there", "claimed"]

LOCK = ".edgeqat-lock"
AUTO_NAMES = frozenset({"recipe.auto.yaml", "search", "steps"})
"""What `run --auto` writes beside them."""

ANALYSES = ("sensitivity.json", "sensitivity.jsonl", "sensitivity.svg")
"""What is found out about a run beside it; it stays when the run is resumed."""

MADE_AGAIN = ("report.html", "artifacts", "latency", "samples")
"""What a resumed run makes anew."""

OWN_NAMES = frozenset({"recipe.yaml", "report.json", "checkpoints", *MADE_AGAIN, *ANALYSES, *AUTO_NAMES})
"""What a run writes into its directory; only a directory that holds nothing else is ever replaced."""

NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}
"""How a file system without locks answers."""

CANNOT_WRITE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}
"""The system refuses to write, for a reason that the user can remove."""


class FolderState(Enum):
    """What a directory holds."""

    FREE = "nothing"
    UNFINISHED = "an unfinished run"
    FINISHED = "a finished run"


def check_free(folder: Path, overwrite: bool = False, resume: bool = False) -> FolderState:
    """Checks, without touching it, that a run may be written to `folder`, or resumed there.

    Raises:
        OutputError: It is a file, is being written by another process, holds something else than a run, or holds
            a run and neither `overwrite` nor `resume` is on.
    """
    state = _state_of(folder)
    if _in_use(folder):
        raise _busy(folder)
    _refuse(folder, state, overwrite, resume)
    return state


def check_there(path: Path) -> None:
    """Checks that what a run has written is still there: a directory made anew would hold a part of the run alone.

    Raises:
        OutputError: It has been moved or removed.
    """
    if not path.exists():
        raise OutputError(f"{path} is gone, in the midst of a run; put it back and resume, or start again")


@contextmanager
def claimed(folder: Path, overwrite: bool = False, resume: bool = False) -> Iterator[None]:
    """Within it, `folder` is this process's: emptied, or, to be resumed, freed of what a killed run left half-made.

    Raises:
        OutputError: It cannot be made or written, or another process was quicker.
    """
    check_free(folder, overwrite, resume)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make the directory {folder}: {error.strerror}; choose another place") from error
    with _locked(folder):
        state = _state_of(folder)  # again: another run may have been here since
        _refuse(folder, state, overwrite, resume)
        if resume and state is FolderState.FINISHED:
            raise OutputError(f"another process has just finished the run in {folder}; start the command again")
        try:
            if resume and state is FolderState.UNFINISHED:
                _tidy(folder)
            else:
                _empty(folder)
            yield
        except OSError as error:
            if error.errno not in CANNOT_WRITE:
                raise
            place = folder if error.filename is None else error.filename
            raise OutputError(f"cannot write {place}: {error.strerror}; free space or choose another place") from error


def _state_of(folder: Path) -> FolderState:
    try:
        entries = {path.name for path in folder.iterdir()}
    except FileNotFoundError:
        return FolderState.FREE
    except NotADirectoryError as error:
        file = next(place for place in (folder, *folder.parents) if place.exists())
        raise OutputError(f"{file} is a file, wanted a directory for the run") from error
    except OSError as error:
        raise OutputError(f"cannot read the directory {folder}: {error.strerror}; choose another place") from error
    if not entries:
        return FolderState.FREE
    foreign = sorted(name for name in entries if name not in OWN_NAMES and name != LOCK and not _is_temporary(name))
    if foreign:
        raise OutputError(
            f"{folder} holds files that are no edgeqat run, such as {foreign[0]}; choose another directory"
        )
    if "recipe.yaml" not in entries and LOCK not in entries:
        raise OutputError(
            f"{folder} holds {min(entries)} but no recipe.yaml, without which it is no run to resume or replace; "
            "restore recipe.yaml, delete the directory, or choose another"
        )
    if "recipe.yaml" not in entries:  # killed while it emptied the directory or before it wrote anything
        return FolderState.FREE
    return FolderState.FINISHED if "report.json" in entries else FolderState.UNFINISHED


def _is_temporary(name: str) -> bool:
    """Whether a killed run left it: such a file is named .report.json.abc123 after the one it was to become."""
    return name.startswith(tuple(f".{own}." for own in OWN_NAMES))


def _refuse(folder: Path, state: FolderState, overwrite: bool, resume: bool) -> None:
    if state is FolderState.FREE or overwrite or resume:
        return
    ways = "pass --overwrite to replace it"
    if state is FolderState.UNFINISHED:
        ways = "pass --resume to continue it, --overwrite to replace it"
    raise OutputError(f"{folder} holds {state.value}; {ways}, or choose another directory")


def _empty(folder: Path) -> None:
    # The recipe goes first: what is left then, beside the lock file, counts as nothing.
    for path in sorted(folder.iterdir(), key=lambda path: path.name != "recipe.yaml"):
        if path.name != LOCK:
            _remove(path)


def _tidy(folder: Path) -> None:
    """Removes temporary files and what is made again; checkpoints stay."""
    for path in folder.iterdir():
        if path.name in MADE_AGAIN or _is_temporary(path.name):
            _remove(path)
    for path in [*(folder / "checkpoints").rglob(".*")]:
        _remove(path)
    epochs = folder / "checkpoints" / "epochs"
    for path in [*epochs.glob("*.safetensors")]:
        if not path.with_suffix(".json").exists():
            _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _busy(folder: Path) -> OutputError:
    return OutputError(f"another process is writing a run into {folder}; wait for it, or choose another directory")


def _in_use(folder: Path) -> bool:
    """Whether another process holds the lock."""
    if not (folder / LOCK).exists():
        return False
    try:
        handle = os.open(folder / LOCK, os.O_RDONLY)
    except OSError:  # gone, or not readable: claiming it will tell
        return False
    try:
        return not _flock(handle, exclusive=False)
    finally:
        os.close(handle)


def _flock(handle: int, exclusive: bool) -> bool:
    """Takes the lock, without waiting; False if another process holds it."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(handle, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    return True


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    path = folder / LOCK
    try:
        handle = _acquire(path)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}; choose another place") from error
    try:
        yield
    finally:
        # Without a recipe the lock file alone says that what lies here is ours.
        with contextlib.suppress(OSError):  # a lock file that stays does no harm
            if (folder / "recipe.yaml").exists() or {entry.name for entry in folder.iterdir()} == {LOCK}:
                path.unlink()
        os.close(handle)


def _acquire(path: Path) -> int:
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        if not _flock(handle, exclusive=True):
            os.close(handle)
            raise _busy(path.parent)
        # Its last holder may have removed the file between the two calls: then it is locked for nobody to see.
        if path.exists() and os.path.samestat(os.fstat(handle), path.stat()):
            return handle
        os.close(handle)
