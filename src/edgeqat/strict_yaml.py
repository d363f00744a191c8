"""YAML as recipes are written in it: safe, each key once, and whatever is wrong is one line."""

from __future__ import annotations

import re
from typing import Any

import yaml

from edgeqat.errors import RecipeError

__all__ = ["MAX_DEPTH", "dump_yaml", "parse_yaml"]

MAX_DEPTH = 50
"""Of nested lists and mappings; no recipe comes near, and Python's own limit would end in a traceback."""


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads 1e-3 as a number, as YAML 1.2 and every user do, and takes each key once."""

    _depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise yaml.YAMLError(f"lists and mappings are nested deeper than {MAX_DEPTH}")
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        # YAML forbids a key that comes twice; PyYAML lets the last one win without a word.
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if (key.tag, str(key.value)) in seen:
                raise yaml.YAMLError(f"found the key {key.value} twice, again in line {key.start_mark.line + 1}")
            seen.add((key.tag, str(key.value)))
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


UNUSUAL_BREAKS = re.compile("[\x85\u2028\u2029]")
"""Ends of lines that YAML folds into spaces unless they are escaped."""


class _Dumper(yaml.SafeDumper):
    """Quotes the strings that the loader would read as numbers, and escapes what it would fold."""


def _string(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    style = '"' if UNUSUAL_BREAKS.search(text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style)


_Dumper.add_representer(str, _string)
_Dumper.yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


def parse_yaml(text: str, what: str) -> Any:
    """The value that a YAML text stands for.

    Args:
        text: The text.
        what: What it is, for messages.

    Raises:
        RecipeError: It is no YAML, a value does not fit its tag, a key comes twice, or it is nested too deeply.
    """
    try:
        return yaml.load(text, _Loader)  # noqa: S506  it is a SafeLoader
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError) as error:
        # PyYAML's constructors of scalars let through what Python raises: !!int x, !!bool x, 2024-13-01.
        raise RecipeError(f"{what} is not valid YAML: {' '.join(str(error).split())}") from error


def dump_yaml(data: Any) -> str:
    """YAML in which keys keep their order; `parse_yaml` reads it as equal data."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
