"""Sizes that a graph is captured without: the batch, and on request the height and width of images."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from edgeqat.errors import CaptureError
from edgeqat.program import BATCH_DIM

__all__ = ["check_any_size", "check_ops_of_open_sizes", "dynamic_shapes", "name_of", "names_of_symbols"]

ADAPTIVE_POOLS = frozenset({torch.ops.aten.adaptive_avg_pool2d.default, torch.ops.aten.adaptive_max_pool2d.default})

IMAGE_DIMS = {2: "height", 3: "width"}
"""Of a 4-d input, which sizes may change beside the batch."""


def dynamic_shapes(call: Any, dynamic_size: bool) -> Any:
    """What torch.export is told of a call's tensors: which of their sizes are not the example's alone."""
    batch = torch.export.Dim(BATCH_DIM, min=1)

    def of(tensor: Tensor) -> dict[int, Any]:
        images = IMAGE_DIMS if dynamic_size and tensor.dim() == 4 else {}
        # torch.export finds out by itself what these must satisfy, such as two inputs being of one height.
        return {0: batch} | dict.fromkeys(images, torch.export.Dim.DYNAMIC)

    return pytree.tree_map(of, call)


def check_any_size(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Runs a copy of a model on images of twice the height and width: torch.export may put off what forbids them.

    Raises:
        CaptureError: The model does not take them.
    """

    def larger(tensor: Tensor) -> Tensor:
        return tensor.repeat(1, 1, 2, 2) if tensor.dim() == 4 else tensor

    call: Any = pytree.tree_map(larger, (args, kwargs))
    own = copy.deepcopy(model)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            own(*call[0], **call[1])
    except Exception as error:
        # The model is the user's code, which may raise anything.
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise CaptureError(
            f"{type(model).__name__} does not take images of twice the example's height and width: {reason}; prepare "
            "it without dynamic_size, for one size"
        ) from error


def check_ops_of_open_sizes(nodes: Iterable[fx.Node]) -> None:
    """Refuses ops that torch.onnx writes for one size, whatever it is told.

    Raises:
        CaptureError: There is one.
    """
    for node in nodes:
        if node.target not in ADAPTIVE_POOLS:
            continue
        x, wanted = node.args[0], node.args[1]
        sizes = x.meta["val"].shape[2:] if isinstance(x, fx.Node) else ()
        if any(not isinstance(size, int) for size in sizes) and set(pytree.tree_leaves(wanted)) != {1}:
            raise CaptureError(
                f"found {node.target} to {wanted} of an open size, wanted to 1 or of a fixed size: ONNX has no op for "
                "it; prepare the model without dynamic_size"
            )


def names_of_symbols(inputs: Sequence[Tensor]) -> dict[str, str]:
    """A name for each symbolic size of captured inputs: batch, height, width, height_1 and so on."""
    names: dict[str, str] = {}
    for tensor in inputs:
        for dim, size in enumerate(tensor.shape):
            symbol, wanted = str(size), IMAGE_DIMS.get(dim, BATCH_DIM)
            if symbol.isdigit() or symbol in names:
                continue
            taken = sum(re.sub(r"_\d+$", "", name) == wanted for name in names.values())
            names[symbol] = f"{wanted}_{taken}" if taken else wanted
    return names


def name_of(size: Any, names: Mapping[str, str]) -> int | str:
    """A size as shapes show it: a number, "batch" for what depends on the batch alone, or a formula."""
    if isinstance(size, int):
        return size
    symbols = {str(symbol) for symbol in size.node.expr.free_symbols}
    if all(names.get(symbol, BATCH_DIM) == BATCH_DIM for symbol in symbols):
        return BATCH_DIM
    return re.sub(r"\b[a-z]\d+\b", lambda found: names.get(found[0], found[0]), str(size))
