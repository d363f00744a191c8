"""The user's own code, named in a recipe as `module:callable` or `file.py:callable`, and other objects of it.

It finds its neighbours as it would when run by `python file.py`, or `python -m module`: the file's folder, or the
working directory, comes first among the places to import from while it is imported, and last from then on, for what
it imports only when it is called.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from edgeqat.errors import ModelError

__all__ = ["USER_ERRORS", "is_callable_name", "resolve_callable", "resolve_object"]

USER_ERRORS = (Exception, SystemExit)
"""What the user's own code may raise: anything, and sys.exit would end a run without a word. Ctrl-C goes through."""


_LATEST: dict[Path, Any] = {}
"""The latest import of each file that was kept."""

_PLACES: list[str] = []
"""The folders that users' code was imported from, the latest first."""


def resolve_callable(target: str, what: str, keep: bool = False) -> Callable[..., Any]:
    """The callable that `module:callable` or `file.py:callable` names. A file is imported afresh.

    Args:
        target: The name.
        what: The recipe key it comes from, for messages.
        keep: Whether `resolve_object` is to find objects of this very import: of another, classes of the same name
            are other classes.

    Raises:
        ModelError: It cannot be imported, or is not callable.
    """
    place, name = _split(target, what, "callable")
    module = _import(place, what)
    if keep and place.endswith(".py"):
        _LATEST[Path(place).resolve()] = module
    found = getattr(module, name, None)
    if not callable(found):
        known = [own for own in dir(module) if callable(getattr(module, own)) and not own.startswith("_")]
        near = difflib.get_close_matches(name, known, n=1)
        raise ModelError(f"{what}: {place} has no callable {name!r}{_meant(near)}")
    return found  # type: ignore[no-any-return]


def resolve_object(target: str, what: str, kind: str) -> Any:
    """The object that `module:object` or `file.py:object` names; None where there is none of that name.

    Args:
        target: The name.
        what: The recipe key it comes from, for messages.
        kind: What is wanted, for messages.

    Raises:
        ModelError: Its module cannot be imported.
    """
    place, name = _split(target, what, kind)
    kept = _LATEST.get(Path(place).resolve()) if place.endswith(".py") else None
    return getattr(_import(place, what) if kept is None else kept, name, None)


def _split(target: str, what: str, kind: str) -> tuple[str, str]:
    place, colon, name = target.rpartition(":")
    if not colon or not place or not name:
        raise ModelError(f"{what}: found {target!r}, wanted module:{kind} or file.py:{kind}")
    return place, name


def _meant(near: list[str]) -> str:
    return f"; did you mean {near[0]}?" if near else ""


def _import(place: str, what: str) -> Any:
    is_file = place.endswith(".py")
    if is_file and not Path(place).is_file():
        others = [path.name for path in sorted(Path(place).parent.glob("*.py"))]
        near = difflib.get_close_matches(Path(place).name, others, n=1)
        raise ModelError(f"{what}: found no file {place}{_meant([str(Path(place).with_name(own)) for own in near])}")
    try:
        with _neighbours(Path(place).resolve().parent if is_file else Path.cwd()):
            return _import_file(Path(place)) if is_file else importlib.import_module(place)
    except USER_ERRORS as error:
        # Importing runs the user's code, which may raise anything; the message is theirs, the key is ours.
        raise ModelError(f"{what}: cannot import {place}: {type(error).__name__}: {error}") from error


@contextlib.contextmanager
def _neighbours(folder: Path) -> Iterator[None]:
    """The modules of a folder can be imported: before all others within this, after all others from then on."""
    place = str(folder)
    for name, module in list(sys.modules.items()):
        own = str(Path(getattr(module, "__file__", None) or "").parent)
        if own in _PLACES and own != place and (folder / f"{name}.py").is_file():
            del sys.modules[name]  # another user's file of that name, imported from elsewhere
    known = place in sys.path and place not in _PLACES
    sys.path.insert(0, place)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # the user's own code may have taken it away
            sys.path.remove(place)
        if not known:
            _PLACES[:] = [place, *(other for other in _PLACES if other != place)]
            sys.path[:] = [*(other for other in sys.path if other not in _PLACES), *_PLACES]


def _import_file(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"edgeqat_user_{path.stem}", path)
    assert spec is not None and spec.loader is not None  # any *.py has them
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def is_callable_name(name: str) -> bool:
    """Whether a name has the form `module:callable` or `file.py:callable`.

    >>> is_callable_name("my.data:make"), is_callable_name("./data.py:make"), is_callable_name("org/name")
    (True, True, False)
    """
    place, colon, own = name.rpartition(":")
    in_module = all(part.isidentifier() for part in place.split("."))
    return bool(colon) and own.isidentifier() and (place.endswith(".py") or in_module)
