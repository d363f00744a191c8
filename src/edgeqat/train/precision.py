"""What the passes of a training step compute in; names as in Lightning."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from edgeqat.errors import InputError

__all__ = ["PRECISIONS", "check_precision", "computing_in", "in_float32"]

PRECISIONS = ("32-true", "bf16-mixed")
"""float32 throughout; or bfloat16 where torch.autocast finds that safe, with weights, grids and losses in float32."""


def check_precision(precision: str) -> None:
    """Checks the name of a precision.

    Raises:
        InputError: There is none of that name.
    """
    if precision not in PRECISIONS:
        raise InputError(f"found the precision {precision!r}, wanted one of {', '.join(PRECISIONS)}")


def computing_in(precision: str, model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """Within it a forward pass of `model` computes in a precision; "32-true" leaves an autocast around it alone."""
    if precision == "32-true":
        return contextlib.nullcontext()
    device = next((parameter.device.type for parameter in model.parameters()), "cpu")
    return torch.autocast(device, torch.bfloat16)


def in_float32(outputs: Any) -> Any:
    """A model's outputs with bfloat16 made float32, so that no loss is computed in 8 bits of precision."""
    return pytree.tree_map_only(Tensor, lambda t: t.float() if t.dtype == torch.bfloat16 else t, outputs)
