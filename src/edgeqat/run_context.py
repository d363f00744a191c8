"""What all stages of one run share: its recipe, folder, data, metric and who is told of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from edgeqat.data.batches import Batches
from edgeqat.data.dataset import Dataset, Samples
from edgeqat.data.loading import Loading
from edgeqat.data.share import ALL, Share
from edgeqat.errors import RecipeError
from edgeqat.factory import build_metric
from edgeqat.graph.pixels import Pixels
from edgeqat.metrics import Metric
from edgeqat.processes import Team
from edgeqat.recipe import Recipe
from edgeqat.reporting.monitor import Monitor
from edgeqat.signature import Batch
from edgeqat.tracking import Tracking

__all__ = ["AGREEMENT", "Run", "loading_of"]

AGREEMENT = "agreement"
"""The metric whose targets are what the float model predicts, so that it needs no labels."""

EVAL_BATCH = 128


@dataclass(eq=False)
class Run:
    """What all stages of one run share."""

    recipe: Recipe
    folder: Path
    data: Dataset
    monitor: Monitor
    tracking: Tracking = field(default_factory=Tracking)
    team: Team = field(default_factory=Team)

    @cached_property
    def metric(self) -> Metric:
        """The metric that the recipe names."""
        return build_metric(self.recipe.task.metric)

    @cached_property
    def pixels(self) -> Pixels | None:
        """The normalisation that quantized models and files do themselves; None where they take normalised images.

        Raises:
            RecipeError: The recipe asks for it, and the data holds no images.
        """
        if self.recipe.data.input != "pixels":
            return None
        if self.data.mean is None or self.data.std is None:
            raise RecipeError(f"data.input: pixels wants images, and {self.data.source} holds none; use normalised")
        return Pixels(self.data.mean, self.data.std)

    def batches(self, split: Samples, train: bool = False, user_model: bool = False, share: Share = ALL) -> Batches:
        """A split in batches; training ones are shuffled and augmented.

        Args:
            split: The samples.
            train: Whether they are trained on.
            user_model: Whether they are for the user's own model, which always takes normalised images.
            share: What of them this process gets.
        """
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
            pixels=self.pixels is not None and not user_model,
            share=share,
            loading=loading_of(self.recipe, train),
        )

    def training(self, user_model: bool = False) -> Batches:
        """The batches that are trained on: this process's part of each."""
        ranks = self.team.ranks
        return self.batches(self.data.train, train=True, user_model=user_model, share=Share(ranks.rank, ranks.size))

    def dealt(self, split: Samples, user_model: bool = False) -> Batches:
        """A split in batches that are dealt out to the processes in turn."""
        ranks = self.team.ranks
        return self.batches(split, user_model=user_model, share=Share(ranks.rank, ranks.size, within=False))

    def example(self, n: int = 2, user_model: bool = False) -> Batch:
        """The first n calibration samples, at most a batch of them; for whom, see `batches`."""
        inputs, _ = next(iter(self.batches(self.data.calibration, user_model=user_model)))
        first: Batch = pytree.tree_map_only(Tensor, lambda t: t[:n], inputs)
        return first


def loading_of(recipe: Recipe, train: bool = False) -> Loading:
    """What samples that are not in memory are read with; a GPU copies from page-locked memory while it computes."""
    compute = recipe.compute
    on_gpu = train and compute.accelerator != "cpu" and torch.cuda.is_available()
    return Loading(compute.workers, compute.timeout, pin_memory=on_gpu)
