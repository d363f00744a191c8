"""What all stages of one run share: its recipe, folder, data, metric and who is told of progress."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import Tensor
from torch.utils import _pytree as pytree

from edgeqat.data.batches import Batches
from edgeqat.data.dataset import Dataset, Split
from edgeqat.factory import build_metric
from edgeqat.metrics import Metric
from edgeqat.recipe import Recipe
from edgeqat.reporting.monitor import Monitor
from edgeqat.signature import Batch

__all__ = ["Run"]

EVAL_BATCH = 128


@dataclass(eq=False)
class Run:
    """What all stages of one run share."""

    recipe: Recipe
    folder: Path
    data: Dataset
    monitor: Monitor

    @cached_property
    def metric(self) -> Metric:
        """The metric that the recipe names."""
        return build_metric(self.recipe.task.metric)

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

    def example(self, n: int = 2) -> Batch:
        """The first n calibration samples, at most a batch of them, as the model takes them."""
        inputs, _ = next(iter(self.batches(self.data.calibration)))
        first: Batch = pytree.tree_map_only(Tensor, lambda t: t[:n], inputs)
        return first
