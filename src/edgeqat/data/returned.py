"""Data that the user's own callable returns, checked before anything relies on it.

    {"train": (inputs, targets), "test": (inputs, targets), "labels": [...], "mean": [...], "std": [...]}

All but train may be left out; without test, one sample in five is set aside for it. Instead of (inputs, targets) a
part may be a sequence of (input, target) pairs, as a torch Dataset is. Without labels the targets are None.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from edgeqat.callables import USER_ERRORS, resolve_callable
from edgeqat.data.dataset import Source, Split, describe, named_leaves
from edgeqat.data.decode import require_memory
from edgeqat.data.readers import PairReader
from edgeqat.data.reading import Reading
from edgeqat.data.stored import StoredSplit
from edgeqat.errors import DataError, EdgeqatError

__all__ = ["read_callable"]

KEYS = ("train", "test", "labels", "mean", "std")
WANTED = "wanted (inputs, targets) or a sequence of (input, target) pairs"


def read_callable(source: str, reading: Reading) -> Source:
    """Calls `module:callable` or `file.py:callable` without arguments and takes what it returns.

    Raises:
        ModelError: it cannot be imported.
        DataError: it fails, or returns something else than the module's docstring says.
    """
    make = resolve_callable(source, "data.source")
    try:
        found = make()
    except EdgeqatError:
        raise
    except USER_ERRORS as error:
        # The user's code may raise anything.
        raise DataError(f"data.source {source} failed: {type(error).__name__}: {error}") from error
    if not isinstance(found, Mapping):
        raise DataError(
            f"data.source {source} returned {describe(found)}, wanted a mapping with train, and perhaps test"
        )
    if any(key not in KEYS for key in found) or "train" not in found:
        raise DataError(
            f"data.source {source} returned a mapping of {', '.join(map(str, found)) or 'nothing'}, "
            "wanted train, and perhaps test, labels, mean, std"
        )
    labels = _labels(source, found.get("labels"))
    mean, std = (_figures(source, key, found.get(key)) for key in ("mean", "std"))
    read = _part if reading.storage == "memory" else functools.partial(_stored, reading=reading)
    training = read(f"{source}: train", found["train"])
    test = read(f"{source}: test", found["test"]) if "test" in found else None
    if isinstance(training, Split) and isinstance(test, Split):
        _check_alike(source, training, test)
    return Source(training, test, labels, mean, std, None if reading.storage == "memory" else reading.sizing)


def _stored(what: str, found: Any, reading: Reading) -> StoredSplit:
    """A dataset whose samples are read when they are needed; its labels are needed beforehand."""
    if reading.storage == "stream":
        raise DataError(f"data.storage: stream reads folders of shards, and {what} is none; use disk")
    targets = getattr(found, "targets", None)
    if isinstance(found, tuple) or targets is None or not hasattr(found, "__getitem__"):
        raise DataError(
            f"{what} is {describe(found)}, wanted for data.storage: disk a sequence of (image, class) pairs with an "
            "attribute targets, the class of each"
        )
    try:
        classes, n = torch.as_tensor(targets), len(found)
    except USER_ERRORS as error:
        # The user's code may raise anything.
        raise DataError(f"{what} has no length or targets: {type(error).__name__}: {error}") from error
    if classes.is_floating_point() or classes.dtype == torch.bool or tuple(classes.shape) != (n,):
        raise DataError(f"{what} has {n} samples and targets {describe(classes)}, wanted a class number for each")
    return reading.stored(what, PairReader(what, found), classes.to(torch.int64))


def _part(what: str, found: Any) -> Split:
    if isinstance(found, tuple) and len(found) == 2:
        inputs, targets = found
    elif hasattr(found, "__len__") and hasattr(found, "__getitem__") and not isinstance(found, (str, bytes, Mapping)):
        inputs, targets = _stack_pairs(what, found)
    else:
        raise DataError(f"{what} is {describe(found)}, {WANTED}")
    inputs, targets = pytree.tree_map(_as_tensor, (inputs, targets))
    if isinstance(targets, Tensor) and targets.ndim == 1 and targets.dtype in (torch.uint8, torch.int16, torch.int32):
        targets = targets.to(torch.int64)
    try:
        split = Split(inputs, targets)
    except DataError as error:
        raise DataError(f"{what}: {error}") from error
    if len(split) == 0:
        raise DataError(f"{what} is empty, wanted at least one sample")
    leaves = named_leaves("inputs", inputs) | ({} if targets is None else named_leaves("targets", targets))
    for name, leaf in leaves.items():
        _check_values(f"{what}: {name}", leaf)
    require_memory(what, sum(leaf.nbytes for leaf in leaves.values()))
    return split


def _stack_pairs(what: str, pairs: Any) -> tuple[Any, Any]:
    """A sequence of (input, target) as (inputs, targets), each tensor with one more dimension."""
    stacks: list[Tensor | None] = []
    wanted = None
    try:
        n = len(pairs)
    except USER_ERRORS as error:
        # The user's code may raise anything.
        raise DataError(f"{what} has no length: {type(error).__name__}: {error}; {WANTED}") from error
    if n == 0:
        raise DataError(f"{what} is empty, wanted at least one sample")
    for index in range(n):
        try:
            pair = pairs[index]
        except USER_ERRORS as error:
            # The user's code may raise anything.
            raise DataError(f"{what}: sample {index} failed: {type(error).__name__}: {error}") from error
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise DataError(f"{what}: sample {index} is {describe(pair)}, wanted an (input, target) pair")
        found, spec = pytree.tree_flatten(tuple(pair))
        if wanted is None:
            wanted = spec
        leaves = [_as_sample(f"{what}: sample {index}", leaf) for leaf in found]
        if not stacks:
            require_memory(what, n * sum(leaf.nbytes for leaf in leaves if leaf is not None))
            stacks = [None if leaf is None else leaf.new_empty(n, *leaf.shape) for leaf in leaves]
        if spec != wanted:
            raise DataError(f"{what}: sample {index} has another structure than sample 0, wanted one for all")
        for stack, leaf in zip(stacks, leaves, strict=True):
            _put(f"{what}: sample {index}", stack, index, leaf)
    assert wanted is not None
    inputs, targets = pytree.tree_unflatten(stacks, wanted)
    return inputs, targets


def _as_sample(what: str, leaf: Any) -> Tensor | None:
    if leaf is None:
        return None
    if isinstance(leaf, (bool, int, float, np.generic)):
        return torch.as_tensor(leaf)
    found = _as_tensor(leaf)
    if not isinstance(found, Tensor):
        raise DataError(f"{what} holds {describe(leaf)}, wanted tensors, arrays or numbers; convert it")
    return found


def _put(what: str, stack: Tensor | None, index: int, leaf: Tensor | None) -> None:
    if (leaf is None) != (stack is None):
        raise DataError(
            f"{what} has {'no' if leaf is None else 'a'} target, unlike sample 0; wanted all or none labelled"
        )
    if leaf is None or stack is None:
        return
    if leaf.shape != stack.shape[1:] or leaf.dtype != stack.dtype:
        raise DataError(f"{what} is {describe(leaf)}, but sample 0 is {describe(stack[0])}; wanted one shape for all")
    stack[index] = leaf


def _as_tensor(leaf: Any) -> Any:
    """NumPy arrays as tensors, all tensors in main memory and without gradients; anything else as it is."""
    if isinstance(leaf, Tensor):
        return leaf.detach().cpu()
    if not isinstance(leaf, np.ndarray):
        return leaf
    try:
        return torch.from_numpy(leaf if leaf.flags.writeable else leaf.copy())
    except (TypeError, ValueError):
        return leaf  # an array of no type or layout that torch has is refused with all else that is no tensor


def _check_values(what: str, leaf: Tensor) -> None:
    if 0 in leaf.shape:
        raise DataError(f"{what} are {describe(leaf)}, wanted no empty dimension")
    if leaf.is_floating_point():
        fine = torch.isfinite(leaf).flatten(1).all(1) if leaf.ndim > 1 else torch.isfinite(leaf)
        if not bool(fine.all()):
            first, n = int((~fine).nonzero()[0]), int((~fine).sum())
            raise DataError(f"{what}: sample {first} holds NaN or infinity ({n} in all); clean the data")


def _check_alike(source: str, training: Split, test: Split) -> None:
    """Refuses parts that no single model could take."""
    if (training.targets is None) != (test.targets is None):
        one, other = ("train", "test") if training.targets is None else ("test", "train")
        raise DataError(f"{source}: {other} has targets and {one} has none, wanted both labelled or neither")
    for name in ("inputs", "targets"):
        trees = getattr(training, name), getattr(test, name)
        (leaves_a, spec_a), (leaves_b, spec_b) = (pytree.tree_flatten(tree) for tree in trees)
        if spec_a != spec_b:
            raise DataError(f"{source}: {name} of train and test differ in structure, wanted the same")
        for a, b in zip(leaves_a, leaves_b, strict=True):
            if a is not None and (a.shape[1:] != b.shape[1:] or a.dtype != b.dtype):
                raise DataError(
                    f"{source}: {name} of train are {describe(a)} and those of test {describe(b)}, wanted "
                    "one type, and one shape but for the number of samples"
                )


def _labels(source: str, found: Any) -> tuple[str, ...] | None:
    if found is None:
        return None
    if isinstance(found, str) or not isinstance(found, Sequence) or not all(isinstance(name, str) for name in found):
        raise DataError(f"data.source {source} returned labels {found!r:.60}, wanted a sequence of class names")
    return tuple(found)


def _figures(source: str, key: str, found: Any) -> tuple[float, ...] | None:
    if found is None:
        return None
    try:
        figures = tuple(float(value) for value in found)
    except (TypeError, ValueError) as error:
        raise DataError(f"data.source {source} returned {key} {found!r:.60}, wanted one number a channel") from error
    if not all(map(math.isfinite, figures)):
        raise DataError(f"data.source {source} returned {key} {list(figures)}, wanted finite numbers")
    return figures
