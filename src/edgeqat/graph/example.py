"""What a model is captured with: example inputs as a call, and the precision that all of it must have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from edgeqat.arguments import named
from edgeqat.errors import InputError, ModelError
from edgeqat.graph.capture_error import last_user_frame
from edgeqat.signature import Batch, call_of

__all__ = ["check_call", "check_float32", "example_call"]


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
            raise InputError(f"found an example input of type {type(leaf).__name__}, wanted tensors only{_way(leaf)}")
        if leaf.dim() == 0 or leaf.shape[0] == 0:
            raise InputError(f"found an example input of shape {tuple(leaf.shape)}, wanted a batch in dimension 0")

    def own(x: Tensor) -> Tensor:
        # A tensor given twice would be taken for one input, so each gets memory of its own.
        return torch.cat([x, x]) if x.shape[0] == 1 else x.clone()

    args, kwargs = pytree.tree_map(own, (args, kwargs))
    return args, kwargs


def _way(found: Any) -> str:
    """How to make a tensor of what is none."""
    if type(found).__module__ == "numpy":
        return "; pass torch.from_numpy(array)"
    if hasattr(found, "__iter__") and not isinstance(found, str):
        return "; of a loader of (inputs, targets) pass next(iter(loader))[0], of one of inputs next(iter(loader))"
    return ""


def check_call(model: nn.Module, example_inputs: Batch, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Runs a model on its example inputs, in eval mode, to tell what torch.export cannot take from what it cannot.

    Args:
        model: Run as it is; it changes nothing that is kept.
        example_inputs: As they were given.
        args: The call that they stand for.
        kwargs: Likewise.

    Raises:
        InputError: It does not take them.
    """
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            model(*args, **kwargs)
    except Exception as error:
        # The model is the user's code, which may raise anything.
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        reason = reason.removesuffix(", but expected one of:")
        leaves = pytree.tree_leaves((args, kwargs))
        found = ", ".join(f"{str(leaf.dtype).removeprefix('torch.')} {list(leaf.shape)}" for leaf in leaves[:3])
        frame = last_user_frame(error)
        raise InputError(
            f"{type(model).__name__} does not take the example inputs, {found}{', ...' * (len(leaves) > 3)}: "
            f"{reason[:200]}{'' if frame is None else f' at {frame}'}; {_remedy(example_inputs, leaves)}"
        ) from error


def _remedy(example_inputs: Batch, leaves: Sequence[Tensor]) -> str:
    if isinstance(example_inputs, (list, tuple)) and len(leaves) > 1:
        return (
            f"found {named(example_inputs)} of {len(leaves)}; of (inputs, targets), as a DataLoader gives them, pass "
            "the inputs: next(iter(loader))[0]; of several batches, pass one"
        )
    if any(leaf.dtype == torch.uint8 for leaf in leaves):
        return (
            "pass them as the model is called: images.float() / 255, normalised; or pixels=edgeqat.Pixels(mean, std) "
            "for a file that takes the pixels themselves"
        )
    if any(leaf.dim() == 3 for leaf in leaves):
        return "wanted a batch of what the model takes, [N, C, H, W] for images; of one image pass image[None]"
    return "pass a batch of what the model is called with: its number of channels, size and type"


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
