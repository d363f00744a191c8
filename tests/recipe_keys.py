"""The keys of a recipe, read off its models."""

from __future__ import annotations

from functools import cache
from typing import Any, get_args

from pydantic_core import PydanticUndefined

from edgeqat.recipe import Recipe
from edgeqat.recipe_quantize import Section

REQUIRED = "required"


@cache
def recipe_keys() -> dict[str, Any]:
    """Dotted keys to defaults; entries of a list are `key[].entry`. A section that came before is one key, None."""
    found: dict[str, Any] = {}
    _collect(Recipe, "", found, set())
    return found


def _collect(section: type[Section], prefix: str, found: dict[str, Any], seen: set[type[Section]]) -> None:
    seen.add(section)
    for name, field in section.model_fields.items():
        default = field.get_default(call_default_factory=True)
        inner = _section_of(field.annotation)
        is_list = isinstance(default, list)
        if inner is None or default is None or is_list or inner in seen:
            found[prefix + name] = REQUIRED if default is PydanticUndefined else default
        if inner is not None and inner not in seen:
            _collect(inner, f"{prefix}{name}{'[]' if is_list else ''}.", found, seen)


def _section_of(annotation: Any) -> type[Section] | None:
    """The section that an annotation holds: itself, or within `list[...]` or `... | None`."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    inner = (_section_of(argument) for argument in get_args(annotation))
    return next((section for section in inner if section is not None), None)
