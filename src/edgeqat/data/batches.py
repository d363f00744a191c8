"""Batches of a split, normalised, in an order that depends only on (seed, epoch)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor
from torch.utils import _pytree as pytree

from edgeqat.data.augment import find_augmentations
from edgeqat.data.dataset import Split
from edgeqat.errors import DataError
from edgeqat.signature import Batch

__all__ = ["Batches", "Inputs", "normalise"]


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(images / 255 - mean) / std: what a device has to do to its camera's pixels.

    Args:
        images: uint8 [B, C, H, W].
        mean: C figures.
        std: C figures above 0.

    Returns:
        float32 [B, C, H, W].

    Raises:
        DataError: mean or std does not have one figure per channel, or a std is not above 0.
    """
    channels = images.shape[1]
    if len(mean) != channels or len(std) != channels:
        raise DataError(f"{len(mean)} means and {len(std)} stds for images of {channels} channels, wanted one each")
    if min(std) <= 0:
        raise DataError(f"std is {list(std)}, wanted figures above 0")
    mean_C11 = torch.tensor(mean, dtype=torch.float32).reshape(-1, 1, 1)
    std_C11 = torch.tensor(std, dtype=torch.float32).reshape(-1, 1, 1)
    return images.to(torch.float32).div_(255).sub_(mean_C11).div_(std_C11)


class Batches:
    """(inputs, targets) over a split; can be iterated any number of times.

    Inputs have the split's structure: images become float32 [B, C, H, W], or stay uint8; float32 tensors stay. Targets
    are the split's, None where it has none. Order and augmentation of an epoch depend only on
    (seed, epoch): a run resumed at epoch k, after `set_epoch(k)`, sees what the uninterrupted run saw.
    Iterating does not advance the epoch; until `set_epoch` it is 0.

    Args:
        split: The samples.
        batch_size: B; the last batch holds what is left, if anything.
        mean: Per channel, of images in 0..1; None where no input is an image.
        std: As `mean`.
        augment: Names in `edgeqat.data.augment.AUGMENTATIONS`, applied in order. They move pixels, so the input must
            be one tensor of images, and targets must be classes, which need not move with them.
        shuffle: Whether each epoch has its own order; else the split's.
        seed: At least 0.
        drop_last: Leaves out a last batch smaller than batch_size.
        pixels: Whether images stay the uint8 pixels that they are, for a model that normalises them itself.

    Raises:
        DataError: an argument out of its range, an unknown augmentation or one that does not fit the split, or
            nothing to iterate over.
    """

    def __init__(
        self,
        split: Split,
        *,
        batch_size: int,
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
        augment: Sequence[str] = (),
        shuffle: bool = False,
        seed: int = 0,
        drop_last: bool = False,
        pixels: bool = False,
    ) -> None:
        if batch_size < 1:
            raise DataError(f"batch_size is {batch_size}, wanted at least 1")
        if seed < 0:
            raise DataError(f"seed is {seed}, wanted at least 0")
        if len(split) == 0 or (drop_last and len(split) < batch_size):
            raise DataError(f"{len(split)} samples make no batch of {batch_size}; lower batch_size or add samples")
        self._augmentations = find_augmentations(augment)
        if augment:
            _check_augmentable(split)
        self._split = split
        self._batch_size = batch_size
        self._mean = mean
        self._std = std
        self._shuffle = shuffle
        self._seed = seed
        self._drop_last = drop_last
        self._pixels = pixels
        self._epoch = 0
        self._take(torch.zeros(1, dtype=torch.int64), Generator())  # a mean or std that does not fit is refused now

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch that the next iteration gives; `epoch` is at least 0."""
        if epoch < 0:
            raise DataError(f"epoch is {epoch}, wanted at least 0")
        self._epoch = epoch

    def __len__(self) -> int:
        full, rest = divmod(len(self._split), self._batch_size)
        return full if rest == 0 or self._drop_last else full + 1

    def __iter__(self) -> Iterator[tuple[Batch, Any]]:
        n = len(self._split)
        generator = _epoch_generator(self._seed, self._epoch)
        order = torch.randperm(n, generator=generator) if self._shuffle else torch.arange(n)
        for batch in range(len(self)):
            chosen = order[batch * self._batch_size : (batch + 1) * self._batch_size]
            yield self._take(chosen, generator)

    def _take(self, chosen: Tensor, generator: Generator) -> tuple[Batch, Any]:
        def prepare(inputs: Tensor) -> Tensor:
            taken = inputs[chosen]
            if taken.dtype != torch.uint8:
                return taken
            for augmentation in self._augmentations:
                taken = augmentation(taken, generator)
            if self._pixels:
                return taken
            if self._mean is None or self._std is None:
                raise DataError("images have no mean and std, wanted one figure per channel each")
            return normalise(taken, self._mean, self._std)

        targets = pytree.tree_map_only(Tensor, lambda t: t[chosen], self._split.targets)
        inputs: Batch = pytree.tree_map(prepare, self._split.inputs)
        return inputs, targets

    def samples_of(self, batch: int) -> Tensor:
        """Indices in the split of a batch's samples, in the epoch that is chosen: int64 [B]."""
        n = len(self._split)
        order = torch.randperm(n, generator=_epoch_generator(self._seed, self._epoch))
        chosen = order if self._shuffle else torch.arange(n)
        return chosen[batch * self._batch_size : (batch + 1) * self._batch_size]

    def inputs(self) -> Inputs:
        """The same batches without their targets, for calibration."""
        return Inputs(self)


class Inputs:
    """The inputs alone of some batches: a re-iterable."""

    def __init__(self, batches: Batches) -> None:
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        return (inputs for inputs, _ in self._batches)


def _check_augmentable(split: Split) -> None:
    if not isinstance(split.inputs, Tensor) or split.inputs.dtype != torch.uint8:
        raise DataError(
            "data.augment moves the pixels of one tensor of uint8 images, and these inputs are no such; "
            "set it to null and augment in the data's own code"
        )
    if split.targets is not None and split.classes is None:
        raise DataError(
            "data.augment moves pixels, and targets that are no classes might have to move with them; "
            "set it to null and augment in the data's own code"
        )


def _epoch_generator(seed: int, epoch: int) -> Generator:
    # SeedSequence mixes the two: seed + epoch would give seed 0's second epoch to seed 1's first.
    state = np.random.SeedSequence(seed, spawn_key=(epoch,)).generate_state(1, np.uint64)
    return Generator().manual_seed(int(state[0] >> np.uint64(1)))
