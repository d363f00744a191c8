"""What the benchmark scripts share: a finished run opened again, and the head every figure is printed under."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch

import edgeqat as eq
from edgeqat.data.batches import Batches
from edgeqat.data.dataset import Dataset, Split
from edgeqat.factory import build_fusions, build_mapping, build_model
from edgeqat.machine import describe_machine
from edgeqat.pipeline import load_data
from edgeqat.recipe import Recipe, load_recipe


@dataclass(frozen=True)
class OpenedRun:
    """A finished run's recipe, data and trained simulation, and its INT8 artifacts by runtime."""

    folder: Path
    recipe: Recipe
    data: Dataset
    sim: eq.SimulatedModel
    artifacts: dict[str, eq.Artifact]

    def test_batches(self, batch_size: int, n: int | None = None) -> Batches:
        """The test split, or its first n samples."""
        split = self.data.test if n is None else self.data.test.take(torch.arange(n))
        return _batches(self.recipe, self.data, split, batch_size)


def open_run(folder: Path) -> OpenedRun:
    """Opens a run, its trained weights from checkpoints/qat.safetensors."""
    recipe = load_recipe(str(folder / "recipe.yaml"))
    data = load_data(recipe)
    model = build_model(recipe.model, 0).eval()
    example, _ = next(iter(_batches(recipe, data, data.calibration, 2)))
    pixels = None
    if recipe.data.input == "pixels" and data.mean is not None and data.std is not None:
        pixels = eq.Pixels(data.mean, data.std)
    mapping, fusions = build_mapping(recipe.quantize), build_fusions(recipe.quantize)
    sim = eq.prepare(model, example, recipe.export, mapping, fusions, pixels=pixels)
    sim.load_state_dict(safetensors.torch.load_file(folder / "checkpoints" / "qat.safetensors"))
    places = sorted((folder / "artifacts" / "qat").iterdir())
    return OpenedRun(folder, recipe, data, sim, {place.name: eq.load_artifact(place) for place in places})


def _batches(recipe: Recipe, data: Dataset, split: Split, batch_size: int) -> Batches:
    """A split as the run's files take it."""
    pixels = recipe.data.input == "pixels"
    return Batches(split, batch_size=batch_size, mean=data.mean, std=data.std, pixels=pixels)


def print_machine(threads: int) -> None:
    """Prints the machine and the versions."""
    machine = describe_machine(threads)
    print(f"machine: {machine.cpu} ({machine.arch}; {' '.join(machine.features)}), {threads} thread(s)")
    print("versions: " + json.dumps(machine.versions))
