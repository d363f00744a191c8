"""How a model is called: what a batch is, and the structure of inputs and outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from edgeqat.errors import InputError

__all__ = ["Batch", "Leaf", "Signature", "call", "call_of"]

Batch: TypeAlias = "Tensor | tuple[Any, ...] | dict[str, Any]"
"""What a model is called with: a tensor, a tuple (positional) or a dict (keyword) of inputs."""

PAIRS = "; of (inputs, targets), as a DataLoader gives them, pass the inputs: [inputs for inputs, _ in loader]"


@dataclass(frozen=True)
class Leaf:
    """What one input tensor must be.

    Attributes:
        shape: Its sizes; None for the batch, and for others that may change.
        dtype: The example's type; any other floating one will do where that is one, as under autocast.
        example: The example's sizes.
    """

    shape: tuple[int | None, ...]
    dtype: torch.dtype
    example: tuple[int, ...]

    @classmethod
    def of(cls, captured: Tensor, example: tuple[int, ...]) -> Leaf:
        """That of a captured input, whose batch is symbolic."""
        return cls(tuple(size if isinstance(size, int) else None for size in captured.shape), captured.dtype, example)

    def takes(self, tensor: Tensor) -> bool:
        """Whether a tensor fits."""
        same = tensor.dtype == self.dtype or (tensor.is_floating_point() and self.dtype.is_floating_point)
        return (
            same
            and tensor.dim() == len(self.shape)
            and all(want is None or size == want for size, want in zip(tensor.shape, self.shape, strict=True))
        )

    def describe(self) -> str:
        """As messages show it."""
        sizes = ", ".join("NCHW"[dim] if size is None else str(size) for dim, size in enumerate(self.shape))
        return f"{str(self.dtype).removeprefix('torch.')} [{sizes}]"


@dataclass(frozen=True, eq=False)
class Signature:
    """How the user's model is called, and what it returns.

    Attributes:
        inputs: Names of its input tensors, in the order of the flattened call: forward's own parameters, where
            each is one tensor.
        in_spec: pytree spec of (args, kwargs).
        out_spec: pytree spec of the output.
        leaves: What each input must be; empty where that is not known.
    """

    inputs: tuple[str, ...]
    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec
    leaves: tuple[Leaf, ...] = ()

    def flatten(self, batch: Batch) -> list[Tensor]:
        """The input tensors of a batch, in the order of `inputs`.

        Raises:
            InputError: The batch has another structure than the example inputs, or a tensor another shape or type.
        """
        return self.flatten_call(*call_of(batch))

    def flatten_call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """The input tensors of a call; see `flatten`."""
        try:
            # Follows the example's structure, whatever the order of the keys.
            leaves: list[Any] = self.in_spec.flatten_up_to((args, dict(kwargs)))
        except ValueError:
            leaves = self._by_name(args, kwargs)
        for name, leaf in zip(self.inputs, leaves, strict=True):
            if not isinstance(leaf, Tensor):
                hint = PAIRS if isinstance(leaf, list) else ""
                raise InputError(f"input {name!r} is a {type(leaf).__name__}, wanted a tensor{hint}")
        for name, leaf, wanted in zip(self.inputs, leaves, self.leaves, strict=False):
            if not wanted.takes(leaf):
                found = f"{str(leaf.dtype).removeprefix('torch.')} {list(leaf.shape)}"
                raise InputError(f"input {name!r} is {found}, wanted {wanted.describe()} as in the example inputs")
        return leaves

    def _by_name(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
        # The same tensors may come by position once and by keyword another time.
        named = dict(zip(self.inputs, args, strict=False)) | dict(kwargs)
        if len(args) + len(kwargs) != len(self.inputs) or set(named) != set(self.inputs):
            found = [*(f"#{i}" for i in range(len(args))), *kwargs]
            hint = PAIRS if len(found) > len(self.inputs) else ""
            raise InputError(f"found inputs {found}, wanted {list(self.inputs)} as in the example inputs{hint}")
        return [named[name] for name in self.inputs]

    def output_keys(self) -> list[str | None]:
        """Where each output tensor is in what the model returns: "boxes", "1", "heads.0"; None for it alone."""
        found = pytree.tree_unflatten(list(range(self.out_spec.num_leaves)), self.out_spec)
        paths = [path for path, _ in pytree.tree_flatten_with_path(found)[0]]
        return [".".join(map(_key_of, path)) or None for path in paths]

    def unflatten(self, outputs: Sequence[Tensor]) -> Any:
        """The model's own output structure around its output tensors."""
        return pytree.tree_unflatten(list(outputs), self.out_spec)


def _key_of(step: Any) -> str:
    """A step into a dict, a sequence, or an object with fields."""
    if isinstance(step, pytree.MappingKey):
        return str(step.key)
    return str(step.idx if isinstance(step, pytree.SequenceKey) else step.name)


def call_of(batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The (args, kwargs) that a batch stands for."""
    if isinstance(batch, dict):
        return (), batch
    if isinstance(batch, tuple):
        return batch, {}
    return (batch,), {}


def call(model: Callable[..., Any], batch: Batch) -> Any:
    """What a model returns for a batch."""
    args, kwargs = call_of(batch)
    return model(*args, **kwargs)
