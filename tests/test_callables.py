"""Callables by name; how each name is refused is tested with the model factories in test_factory.py."""

from __future__ import annotations

import os

import pytest

from edgeqat.callables import resolve_callable
from edgeqat.errors import ModelError


def test_resolve_callable_names_the_key() -> None:
    assert resolve_callable("os.path:join", "task.loss") is os.path.join
    with pytest.raises(ModelError, match=r"^task.metric: found 'x', wanted module:callable"):
        resolve_callable("x", "task.metric")
