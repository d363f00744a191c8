"""Dataclasses that a model returns: torch.export takes one only if pytree knows its fields."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

__all__ = ["register_output_dataclasses"]


def register_output_dataclasses(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Registers with pytree, for this process, every dataclass in what a model returns that is not known to it.

    The model runs once. A class that its fields alone do not make is left out: it could not be built again.

    Returns:
        Whether one was registered, so that another try of torch.export may succeed.
    """
    with torch.no_grad():
        waiting = [model(*args, **kwargs)]
    registered = False
    while waiting:
        for leaf in pytree.tree_leaves(waiting.pop()):
            if not dataclasses.is_dataclass(leaf) or isinstance(leaf, type):
                continue
            fields = dataclasses.fields(leaf)
            if not all(field.init for field in fields):
                continue
            torch.export.register_dataclass(type(leaf))
            registered = True
            waiting += [getattr(leaf, field.name) for field in fields]
    return registered
