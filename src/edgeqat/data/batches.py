"""Batches of a split, normalised, in an order that depends only on (seed, epoch)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Generator, Tensor

from edgeqat.data.augment import find_augmentations
from edgeqat.data.sources import Split
from edgeqat.errors import DataError

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

    Inputs are float32 [B, C, H, W], targets int64 [B]. Order and augmentation of an epoch depend only on
    (seed, epoch): a run resumed at epoch k, after `set_epoch(k)`, sees what the uninterrupted run saw.
    Iterating does not advance the epoch; until `set_epoch` it is 0.

    Args:
        split: The samples.
        batch_size: B; the last batch holds what is left, if anything.
        mean: Per channel, of images in 0..1.
        std: Per channel, of images in 0..1.
        augment: Names in `edgeqat.data.augment.AUGMENTATIONS`, applied in order.
        shuffle: Whether each epoch has its own order; else the split's.
        seed: At least 0.
        drop_last: Leaves out a last batch smaller than batch_size.

    Raises:
        DataError: an argument out of its range, an unknown augmentation, or nothing to iterate over.
    """

    def __init__(
        self,
        split: Split,
        *,
        batch_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        augment: Sequence[str] = (),
        shuffle: bool = False,
        seed: int = 0,
        drop_last: bool = False,
    ) -> None:
        if batch_size < 1:
            raise DataError(f"batch_size is {batch_size}, wanted at least 1")
        if seed < 0:
            raise DataError(f"seed is {seed}, wanted at least 0")
        if len(split) == 0 or (drop_last and len(split) < batch_size):
            raise DataError(f"{len(split)} samples make no batch of {batch_size}; lower batch_size or add samples")
        normalise(split.images[:1], mean, std)  # so that a mean or std that does not fit is refused now
        self._split = split
        self._batch_size = batch_size
        self._mean = tuple(mean)
        self._std = tuple(std)
        self._augmentations = find_augmentations(augment)
        self._shuffle = shuffle
        self._seed = seed
        self._drop_last = drop_last
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch that the next iteration gives; `epoch` is at least 0."""
        if epoch < 0:
            raise DataError(f"epoch is {epoch}, wanted at least 0")
        self._epoch = epoch

    def __len__(self) -> int:
        full, rest = divmod(len(self._split), self._batch_size)
        return full if rest == 0 or self._drop_last else full + 1

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        n = len(self._split)
        generator = _epoch_generator(self._seed, self._epoch)
        order = torch.randperm(n, generator=generator) if self._shuffle else torch.arange(n)
        for batch in range(len(self)):
            chosen = order[batch * self._batch_size : (batch + 1) * self._batch_size]
            images = self._split.images[chosen]
            for augmentation in self._augmentations:
                images = augmentation(images, generator)
            yield normalise(images, self._mean, self._std), self._split.labels[chosen]

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
    """The inputs alone of some batches: a re-iterable of float32 [B, C, H, W]."""

    def __init__(self, batches: Batches) -> None:
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Tensor]:
        return (inputs for inputs, _ in self._batches)


def _epoch_generator(seed: int, epoch: int) -> Generator:
    # SeedSequence mixes the two: seed + epoch would give seed 0's second epoch to seed 1's first.
    state = np.random.SeedSequence(seed, spawn_key=(epoch,)).generate_state(1, np.uint64)
    return Generator().manual_seed(int(state[0] >> np.uint64(1)))
