"""One hash that says whether data is the same: another order, label or pixel gives another one."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["fingerprint"]


class _Hash(Protocol):
    def update(self, data: Any, /) -> None: ...


def fingerprint(data: Any) -> str:
    """Hex sha256 of a Dataset: all splits, their targets, and how they are normalised."""
    digest = hashlib.sha256()
    _feed(digest, data)
    return digest.hexdigest()


def _feed(digest: _Hash, value: Any) -> None:
    """Adds a value under its kind and size, so that no two structures give one stream of bytes."""
    if isinstance(value, Tensor):
        digest.update(f"tensor {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    elif hasattr(value, "identity"):  # a split
        _feed(digest, value.identity())
    elif is_dataclass(value):
        named = {field.name: getattr(value, field.name) for field in fields(value)}
        _feed(digest, named)
    elif isinstance(value, Mapping):
        digest.update(f"mapping {len(value)}\n".encode())
        for key, inner in value.items():
            digest.update(f"{key!r}\n".encode())
            _feed(digest, inner)
    elif isinstance(value, (tuple, list)):
        digest.update(f"sequence {len(value)}\n".encode())
        for inner in value:
            _feed(digest, inner)
    else:
        digest.update(f"{type(value).__name__} {value!r}\n".encode())
