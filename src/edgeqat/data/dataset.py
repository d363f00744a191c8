"""A data set: splits of inputs and targets, in memory or not, and what a device must know of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Generator, Tensor
from torch.utils import _pytree as pytree

from edgeqat.data.loading import Loading
from edgeqat.data.share import Request
from edgeqat.data.sizing import Sizing
from edgeqat.errors import DataError
from edgeqat.signature import Batch

__all__ = ["Dataset", "Samples", "Source", "Split", "classes_of", "describe", "named_leaves", "samples_at"]


class Samples(Protocol):
    """What everything but reading relies on in a split, wherever its inputs are; its targets are in memory."""

    @property
    def inputs(self) -> Batch:
        """The inputs where they are in memory.

        Raises:
            DataError: they are not.
        """
        ...

    @property
    def targets(self) -> Any:
        """Classes, int64 [N]; or any pytree of tensors; or None where there are no labels."""
        ...

    @property
    def classes(self) -> Tensor | None:
        """The targets where they are classes; else None."""
        ...

    @property
    def image_inputs(self) -> list[Tensor]:
        """Those inputs that are images and held in memory, uint8 [N, C, H, W]."""
        ...

    @property
    def image_size(self) -> tuple[int, int] | None:
        """Height and width where the inputs are one tensor of images, else None."""
        ...

    @property
    def encoded(self) -> bool:
        """Whether images are decoded as they are read, so that a crop can be taken of the image as it was stored."""
        ...

    def __len__(self) -> int: ...

    def take(self, indices: Tensor) -> Split:
        """The samples at `indices` (int64 [M]) in memory, in that order, but for those that cannot be read."""
        ...

    def subset(self, indices: Tensor) -> Samples:
        """The samples at `indices`, where they are; a stream keeps its own order."""
        ...

    def labelled(self, targets: Any) -> Samples:
        """The same inputs with other targets."""
        ...

    def checked(self, loading: Loading) -> Samples:
        """Itself without the samples that cannot be read, as far as `data.max_corrupt` lets them be skipped."""
        ...

    def blank(self) -> Any:
        """Inputs of one sample, all zero."""
        ...

    def order(self, generator: Generator | None) -> Tensor:
        """The order of an epoch, a permutation of 0 .. N - 1; without a generator its own."""
        ...

    def read(self, order: Tensor, requests: Iterable[Request], loading: Loading) -> Iterator[tuple[Any, Any]]:
        """(inputs, targets) of each request; requests follow `order`, and their inputs are new tensors."""
        ...

    def identity(self) -> Any:
        """What a fingerprint is made of: all of what is in memory, names, sizes and targets of what is not."""
        ...


@dataclass(frozen=True, eq=False)
class Split:
    """Samples in memory; dimension 0 of every tensor counts them.

    Attributes:
        inputs: Images, uint8 [N, C, H, W]; or float32 tensors of any shape, used as they are; or a tuple or dict of
            those, for a model with several inputs.
        targets: Classes, int64 [N]; or any pytree of tensors; or None where there are no labels.

    Raises:
        DataError: a tensor has another type or shape, or they differ in length.
    """

    inputs: Batch
    targets: Any

    def __post_init__(self) -> None:
        leaves = named_leaves("inputs", self.inputs)
        if not isinstance(self.inputs, (Tensor, tuple, dict)) or not leaves:
            raise DataError(
                f"inputs are a {type(self.inputs).__name__}, wanted a tensor, or a tuple or dict of tensors"
            )
        for name, leaf in leaves.items():
            images = isinstance(leaf, Tensor) and leaf.dtype == torch.uint8 and leaf.ndim == 4
            numbers = isinstance(leaf, Tensor) and leaf.dtype == torch.float32 and leaf.ndim > 0
            if not images and not numbers:
                raise DataError(f"{name} are {describe(leaf)}, wanted images, uint8 [N, C, H, W], or float32 [N, ...]")
        targets = {} if self.targets is None else named_leaves("targets", self.targets)
        if self.targets is not None and not targets:
            raise DataError(f"targets are an empty {type(self.targets).__name__}, wanted tensors, or None")
        for name, leaf in targets.items():
            if not isinstance(leaf, Tensor) or leaf.ndim == 0:
                raise DataError(f"{name} are {describe(leaf)}, wanted a tensor with a figure per sample, or None")
        for name, leaf in (leaves | targets).items():
            if len(leaf) != len(self):
                raise DataError(f"{len(self)} inputs have {len(leaf)} {name}, wanted one each")

    def __len__(self) -> int:
        return len(pytree.tree_leaves(self.inputs)[0])

    @property
    def classes(self) -> Tensor | None:
        """The targets where they are classes, int64 [N]; else None."""
        return classes_of(self.targets)

    @property
    def image_inputs(self) -> list[Tensor]:
        """Those inputs that are images, uint8 [N, C, H, W]."""
        return [leaf for leaf in pytree.tree_leaves(self.inputs) if leaf.dtype == torch.uint8]

    @property
    def image_size(self) -> tuple[int, int] | None:
        """Height and width where the inputs are one tensor of images, else None."""
        if not isinstance(self.inputs, Tensor) or self.inputs.dtype != torch.uint8:
            return None
        height, width = self.inputs.shape[2:]
        return height, width

    @property
    def encoded(self) -> bool:
        """Whether images are decoded as they are read."""
        return False

    def take(self, indices: Tensor) -> Split:
        """A copy of the samples at `indices` (int64 [M]), in that order."""
        inputs, targets = samples_at((self.inputs, self.targets), indices)
        return Split(inputs, targets)

    def subset(self, indices: Tensor) -> Split:
        """As `take`."""
        return self.take(indices)

    def labelled(self, targets: Any) -> Split:
        """The same inputs with other targets."""
        return Split(self.inputs, targets)

    def checked(self, loading: Loading) -> Split:
        """Itself: what is in memory has been read."""
        return self

    def blank(self) -> Any:
        """Inputs of one sample, all zero."""
        return pytree.tree_map_only(Tensor, torch.zeros_like, self.take(torch.zeros(1, dtype=torch.int64)).inputs)

    def order(self, generator: Generator | None) -> Tensor:
        """A permutation, or 0 .. N - 1."""
        return torch.arange(len(self)) if generator is None else torch.randperm(len(self), generator=generator)

    def read(self, order: Tensor, requests: Iterable[Request], loading: Loading) -> Iterator[tuple[Any, Any]]:
        """(inputs, targets) of each request, as new tensors."""
        for request in requests:
            yield samples_at((self.inputs, self.targets), request.chosen[request.own])

    def identity(self) -> dict[str, Any]:
        """Everything that it holds."""
        return {"inputs": self.inputs, "targets": self.targets}


@dataclass(frozen=True, eq=False)
class Source:
    """A source as read, before anything is set aside.

    Attributes:
        training: What train, calibration and validation are taken from.
        test: None where the source has no test part: a share of training is set aside then.
        labels: The class names, by class; None where none are known.
        mean, std: Its defaults, per channel of images in 0..1; None: measured over what is not tested.
        sizing: How its images came to their size; None where they are used as they came.
    """

    training: Samples
    test: Samples | None
    labels: tuple[str, ...] | None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    sizing: Sizing | None = None


@dataclass(frozen=True, eq=False)
class Dataset:
    """Four disjoint splits and how to normalise them.

    Attributes:
        source: The name or path it was loaded from, as given.
        train, calibration, validation, test: What is fitted, what seeds activation ranges, what training is
            watched on, and what is reported. Without labels nothing is trained, and validation is empty.
        mean, std: Per channel, of images in 0..1; None where the inputs are float32.
        labels: The class names, by class; None where there are no classes.
        sizing: How RGB images came to their size; None where inputs are used as they came.
    """

    source: str
    train: Samples
    calibration: Split
    validation: Split
    test: Samples
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    labels: tuple[str, ...] | None
    sizing: Sizing | None = None

    def preprocessing(self, pixels: bool = False) -> dict[str, Any]:
        """What a device has to do to its inputs, JSON-ready; `pixels`: whether the model normalises images itself.

        Where the model has several inputs there is an entry for each, by its keyword or its position.
        """
        labels = {"labels": None if self.labels is None else list(self.labels)}
        inputs = self.calibration.inputs
        if isinstance(inputs, Tensor):
            return self._preprocessing_of(inputs, pixels) | labels
        each = inputs if isinstance(inputs, dict) else {str(i): part for i, part in enumerate(inputs)}
        leaves = {name: leaf for key, part in each.items() for name, leaf in named_leaves(key, part).items()}
        return {"inputs": {name: self._preprocessing_of(leaf, pixels) for name, leaf in leaves.items()}} | labels

    def _preprocessing_of(self, inputs: Tensor, pixels: bool) -> dict[str, Any]:
        if inputs.dtype != torch.uint8 or self.mean is None or self.std is None:
            return {"input": "float32 as given", "layout": None, "resize": None}
        channels = inputs.shape[1]
        # What the user's own code returned may have any order of channels; only what was decoded here is RGB.
        colours = "RGB" if self.sizing is not None else f"{channels} channel{'' if channels == 1 else 's'}"
        normalisation = {"mean": list(self.mean), "std": list(self.std)}
        given: dict[str, Any] = {"input": f"{colours} in 0..1", **normalisation}
        if pixels:
            given = {"input": f"{colours}, pixels in 0..255", "mean": None, "std": None, "in_the_model": normalisation}
        return {**given, "layout": "NCHW", "resize": None if self.sizing is None else self.sizing.steps()}


def classes_of(targets: Any) -> Tensor | None:
    """Targets where they are classes, int64 [N]; else None."""
    return targets if isinstance(targets, Tensor) and targets.dtype == torch.int64 and targets.ndim == 1 else None


def samples_at(tree: Any, indices: Tensor) -> Any:
    """Those samples of every tensor of a pytree, as new tensors."""
    return pytree.tree_map_only(Tensor, lambda t: t[indices], tree)


def named_leaves(name: str, tree: Any) -> dict[str, Any]:
    """The leaves of a pytree by name: `inputs`, `inputs[0]`, `inputs['left']`."""
    leaves, _ = pytree.tree_flatten_with_path(tree)
    return {f"{name}{pytree.keystr(path)}": leaf for path, leaf in leaves}


def describe(found: Any) -> str:
    """`float32 [2, 3]` for a tensor, else the name of its type."""
    if isinstance(found, Tensor):
        return f"{str(found.dtype).removeprefix('torch.')} {list(found.shape)}"
    return f"a {type(found).__name__}"
