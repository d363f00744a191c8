"""What a model is captured with: example inputs as a call, and the precision that all of it must have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from edgeqat.errors import InputError, ModelError
from edgeqat.signature import Batch, call_of

__all__ = ["check_float32", "example_call"]


def example_call(example_inputs: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(args, kwargs) of a call with copies of the example inputs; a batch of 1 is doubled.

    Raises:
        InputError: There are none, or one is no tensor or has no batch.
    """
    args, kwargs = call_of(example_inputs)
    leaves = pytree.tree_leaves((args, kwargs))
    if not leaves:
        raise InputError("found no example inputs, wanted at least one tensor")
    for leaf in leaves:
        if not isinstance(leaf, Tensor):
            raise InputError(f"found an example input of type {type(leaf).__name__}, wanted tensors only")
        if leaf.dim() == 0 or leaf.shape[0] == 0:
            raise InputError(f"found an example input of shape {tuple(leaf.shape)}, wanted a batch in dimension 0")

    def own(x: Tensor) -> Tensor:
        # A tensor given twice would be taken for one input, so each gets memory of its own.
        return torch.cat([x, x]) if x.shape[0] == 1 else x.clone()

    args, kwargs = pytree.tree_map(own, (args, kwargs))
    return args, kwargs


def check_float32(model: nn.Module, inputs: Sequence[Tensor]) -> None:
    """Refuses other precisions: grids, the reference and all runtimes compute what stays in float in float32.

    Raises:
        ModelError: A parameter is of another floating type.
        InputError: An example input is.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.dtype != torch.float32:
            raise ModelError(f"found {parameter.dtype} parameters ({name}), wanted float32: call model.float()")
    for tensor in inputs:
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise InputError(f"found {tensor.dtype} example inputs, wanted float32: convert them with .float()")
