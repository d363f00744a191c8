"""What pydantic finds wrong with a YAML file, in one line."""

from __future__ import annotations

import difflib
from typing import Any

from pydantic import BaseModel, ValidationError

__all__ = ["explain"]


def explain(error: ValidationError, root: type[BaseModel]) -> str:
    """The first thing that is wrong with data for the model `root`, with its dotted path."""
    first = error.errors()[0]
    path = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = _known_keys(root, first["loc"][:-1])
        close = difflib.get_close_matches(str(first["loc"][-1]), known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"wanted one of {', '.join(known)}"
        return f"unknown key {path}; {hint}"
    # pydantic names the class, which is ours.
    is_section = first["type"] == "model_type"
    message = "wanted a mapping of keys" if is_section else first["msg"].removeprefix("Value error, ")
    found = repr(first["input"])
    return f"{path}: found {found[:80]}: {message[:1].lower()}{message[1:]}"


def _known_keys(root: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    section: Any = root
    for part in location:
        if isinstance(part, int):
            continue
        annotation = section.model_fields[part].annotation
        options = [annotation, *getattr(annotation, "__args__", ())]
        models = [o for o in options if isinstance(o, type) and issubclass(o, BaseModel)]
        if not models:
            return []
        section = models[0]
    return list(section.model_fields)
