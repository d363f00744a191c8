"""The user's own code, named in a recipe as `module:callable` or `file.py:callable`, and other objects of it."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgeqat.errors import ModelError

__all__ = ["USER_ERRORS", "is_callable_name", "resolve_callable", "resolve_object"]

USER_ERRORS = (Exception, SystemExit)
"""What the user's own code may raise: anything, and sys.exit would end a run without a word. Ctrl-C goes through."""


_LATEST: dict[Path, Any] = {}
"""The latest import of each file that was kept."""


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
        raise ModelError(f"{what}: {place} has no callable {name!r}")
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


def _import(place: str, what: str) -> Any:
    try:
        return _import_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except USER_ERRORS as error:
        # Importing runs the user's code, which may raise anything; the message is theirs, the key is ours.
        raise ModelError(f"{what}: cannot import {place}: {type(error).__name__}: {error}") from error


def _import_file(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"edgeqat_user_{path.stem}", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise FileNotFoundError(f"no file {path}")
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
