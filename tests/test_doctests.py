"""Every example in a docstring is executed."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import edgeqat

MODULES = [m.name for m in pkgutil.walk_packages(edgeqat.__path__, "edgeqat.")]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_there_are_examples() -> None:
    assert sum(doctest.testmod(importlib.import_module(name)).attempted for name in MODULES) >= 8
