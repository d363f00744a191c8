"""What all stages of one run share: its recipe, folder, data and who is told of progress."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from edgeqat.data.batches import Batches
from edgeqat.data.sources import Dataset, Split
from edgeqat.recipe import Recipe
from edgeqat.reporting.monitor import Monitor

__all__ = ["Run"]

EVAL_BATCH = 128


@dataclass(eq=False)
class Run:
    """What all stages of one run share."""

    recipe: Recipe
    folder: Path
    data: Dataset
    monitor: Monitor

    def batches(self, split: Split, train: bool = False) -> Batches:
        """A split as normalised batches; training ones are shuffled and augmented."""
        data, seed = self.recipe.data, 0 if self.recipe.train is None else self.recipe.train.seed
        augment = tuple(data.augment) if train and data.augment is not None else ()
        return Batches(
            split,
            batch_size=data.batch_size if train else EVAL_BATCH,
            mean=self.data.mean,
            std=self.data.std,
            augment=augment,
            shuffle=train,
            seed=seed,
        )

    def example(self) -> Tensor:
        """Two samples, as the model takes them."""
        return next(iter(self.batches(self.data.calibration)))[0][:2]
