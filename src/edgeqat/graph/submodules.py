"""Where a dotted name lives below a module."""

from __future__ import annotations

from torch import nn

__all__ = ["owner_of"]


def owner_of(root: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds `name`, made of plain nn.Modules where there is none yet, and the name's last part."""
    *path, leaf = name.split(".")
    for part in path:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        child = root._modules[part]
        assert child is not None
        root = child
    return root, leaf
