"""Batches of a split, normalised, in an order that depends only on (seed, epoch)."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor
from torch.utils import _pytree as pytree

from edgeqat.data.augment import Augmentation, find_augmentations
from edgeqat.data.dataset import Samples
from edgeqat.data.loading import IN_PROCESS, Loading
from edgeqat.data.share import ALL, Request, Share
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
    """(inputs, targets) over a split, or one process's share of them; can be iterated any number of times.

    Inputs have the split's structure: images become float32 [B, C, H, W], or stay uint8; float32 tensors stay. Targets
    are the split's, None where it has none. Order and augmentation of an epoch depend only on
    (seed, epoch), never on the share: a run resumed at epoch k, after `set_epoch(k)`, sees what the uninterrupted run
    saw, and all processes together see what one alone would. Iterating does not advance the epoch; until `set_epoch`
    it is 0.

    Args:
        split: The samples.
        batch_size: B, over all processes; the last batch holds what is left, if anything.
        mean: Per channel, of images in 0..1; None where no input is an image.
        std: As `mean`.
        augment: Names in `edgeqat.data.augment.AUGMENTATIONS`, applied in order. They move pixels, so the input must
            be one tensor of images, and targets must be classes, which need not move with them.
        shuffle: Whether each epoch has its own order; else the split's.
        seed: At least 0.
        drop_last: Leaves out a last batch smaller than batch_size.
        pixels: Whether images stay the uint8 pixels that they are, for a model that normalises them itself.
        share: What this process gets.
        loading: What samples that are not in memory are read with.

    Raises:
        DataError: an argument out of its range, an unknown augmentation or one that does not fit the split, or
            nothing to iterate over.
    """

    def __init__(
        self,
        split: Samples,
        *,
        batch_size: int,
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
        augment: Sequence[str] = (),
        shuffle: bool = False,
        seed: int = 0,
        drop_last: bool = False,
        pixels: bool = False,
        share: Share = ALL,
        loading: Loading = IN_PROCESS,
    ) -> None:
        if batch_size < 1:
            raise DataError(f"batch_size is {batch_size}, wanted at least 1")
        if seed < 0:
            raise DataError(f"seed is {seed}, wanted at least 0")
        if len(split) == 0 or (drop_last and len(split) < batch_size):
            raise DataError(f"{len(split)} samples make no batch of {batch_size}; lower batch_size or add samples")
        self._augmentations = find_augmentations(augment)
        if augment:
            _check_augmentable(split, self._augmentations)
        self._split = split
        self._batch_size = batch_size
        self._mean = mean
        self._std = std
        self._shuffle = shuffle
        self._seed = seed
        self._drop_last = drop_last
        self._pixels = pixels
        self._share = share
        self._loading = loading
        self._epoch = 0
        self._prepare(split.blank(), ())  # a mean or std that does not fit is refused now

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch that the next iteration gives; `epoch` is at least 0."""
        if epoch < 0:
            raise DataError(f"epoch is {epoch}, wanted at least 0")
        self._epoch = epoch

    def __len__(self) -> int:
        """How many batches this process takes part in."""
        return len(self._share.of_batches(self._global_batches()))

    def __iter__(self) -> Iterator[tuple[Batch, Any]]:
        return self.from_batch(0)

    def from_batch(self, first: int) -> Iterator[tuple[Batch, Any]]:
        """The epoch from batch `first` on, 0 .. len: just what a whole iteration gives from there."""
        if not 0 <= first <= len(self):
            raise DataError(f"found batch {first} to begin with, wanted 0 to {len(self)}")
        return self._read(first)

    def samples_of(self, batch: int) -> Tensor:
        """Indices in the split of this process's samples of a batch, in the epoch that is chosen: int64 [B]."""
        number = self._share.of_batches(self._global_batches())[batch]
        chosen = self._chosen(self._order(), number)
        return chosen[self._share.of_batch(len(chosen))]

    def weight_of(self, batch: int) -> float:
        """What the mean over this process's samples of a batch counts for in a mean over processes.

        The mean over processes of weighted means is then the mean over the batch. It is 1 where all have as many
        samples, and 0 where the batch's first sample only stands in.
        """
        number = self._share.of_batches(self._global_batches())[batch]
        return self._share.weight(min(self._batch_size, len(self._split) - number * self._batch_size))

    def _global_batches(self) -> int:
        full, rest = divmod(len(self._split), self._batch_size)
        return full if rest == 0 or self._drop_last else full + 1

    def _read(self, first: int) -> Iterator[tuple[Batch, Any]]:
        generator = self._epoch_generator()
        order = self._split.order(generator if self._shuffle else None)
        waiting: deque[tuple[Tensor, ...]] = deque()

        def asked() -> Iterator[Request]:
            for request, drawn in self._requests(order, generator, first):
                waiting.append(drawn)
                yield request

        for inputs, targets in self._split.read(order, asked(), self._loading):
            batch = self._prepare(inputs, waiting.popleft()), targets
            yield pytree.tree_map_only(Tensor, Tensor.pin_memory, batch) if self._loading.pin_memory else batch

    def _requests(
        self, order: Tensor, generator: Generator, first: int
    ) -> Iterator[tuple[Request, tuple[Tensor, ...]]]:
        """What this process asks for from its batch `first` on, each with what its augmentations have drawn."""
        own_batches = self._share.of_batches(self._global_batches())[first:]
        size = self._split.image_size or (0, 0)
        for number in range(own_batches[-1] + 1 if own_batches else 0):
            chosen = self._chosen(order, number)
            # Batches that are not asked for draw too: what a batch gets must not depend on who asked for the others.
            drawn = [augmentation.draw(len(chosen), size, generator) for augmentation in self._augmentations]
            if number in own_batches:
                own = self._share.of_batch(len(chosen))
                crops = drawn[0] if self._augmentations and self._augmentations[0].encoded else None
                yield Request(chosen, own, crops), tuple(rows[own] for rows in drawn)

    def _order(self) -> Tensor:
        return self._split.order(self._epoch_generator() if self._shuffle else None)

    def _chosen(self, order: Tensor, number: int) -> Tensor:
        return order[number * self._batch_size : (number + 1) * self._batch_size]

    def _epoch_generator(self) -> Generator:
        # SeedSequence mixes the two: seed + epoch would give seed 0's second epoch to seed 1's first.
        state = np.random.SeedSequence(self._seed, spawn_key=(self._epoch,)).generate_state(1, np.uint64)
        return Generator().manual_seed(int(state[0] >> np.uint64(1)))

    def _prepare(self, inputs: Any, drawn: tuple[Tensor, ...]) -> Batch:
        def prepare(taken: Tensor) -> Tensor:
            if taken.dtype != torch.uint8:
                return taken
            for augmentation, rows in zip(self._augmentations, drawn, strict=False):
                taken = augmentation.apply(taken, rows)
            if self._pixels:
                return taken
            if self._mean is None or self._std is None:
                raise DataError("images have no mean and std, wanted one figure per channel each")
            return normalise(taken, self._mean, self._std)

        prepared: Batch = pytree.tree_map(prepare, inputs)
        return prepared

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


def _check_augmentable(split: Samples, augmentations: Sequence[Augmentation]) -> None:
    if split.image_size is None:
        raise DataError(
            "data.augment moves the pixels of one tensor of uint8 images, and these inputs are no such; "
            "set it to null and augment in the data's own code"
        )
    if split.targets is not None and split.classes is None:
        raise DataError(
            "data.augment moves pixels, and targets that are no classes might have to move with them; "
            "set it to null and augment in the data's own code"
        )
    if augmentations[0].encoded and not split.encoded:
        raise DataError(
            "data.augment: random_resized_crop is taken of images as they were stored, and in memory they have their "
            "final size; set data.storage to disk or stream, or use crop"
        )
