"""What a recipe may call a target, known without what targets are made of: a recipe is read before torch is."""

from __future__ import annotations

__all__ = ["is_target_file"]


def is_target_file(target: str) -> bool:
    """Whether a target is given as the path of a file."""
    return target.endswith((".yaml", ".yml"))
