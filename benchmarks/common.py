"""What the benchmark scripts share: a finished run opened again, and the head every figure is printed under."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch

import edgeqat as eq
from edgeqat.data.batches import Batches
from edgeqat.data.dataset import Dataset
from edgeqat.factory import build_mapping, build_model
from edgeqat.machine import describe_machine
from edgeqat.pipeline import load_data
from edgeqat.recipe import Recipe, load_recipe


@dataclass(frozen=True)
class OpenedRun:
    """A finished run's recipe, data, trained simulation and INT8 artifact."""

    folder: Path
    recipe: Recipe
    data: Dataset
    sim: eq.SimulatedModel
    artifact: eq.Artifact

    def test_batches(self, batch_size: int) -> Batches:
        """The test split."""
        return Batches(self.data.test, batch_size=batch_size, mean=self.data.mean, std=self.data.std)


def open_run(folder: Path) -> OpenedRun:
    """Opens a run, its trained weights from checkpoints/qat.safetensors."""
    recipe = load_recipe(str(folder / "recipe.yaml"))
    data = load_data(recipe)
    model = build_model(recipe.model, 0).eval()
    example, _ = next(iter(Batches(data.calibration, batch_size=2, mean=data.mean, std=data.std)))
    sim = eq.prepare(model, example, recipe.export, build_mapping(recipe.quantize), recipe.quantize.fusions)
    sim.load_state_dict(safetensors.torch.load_file(folder / "checkpoints" / "qat.safetensors"))
    sim.set_phase("quantized")
    artifact = eq.load_artifact(folder / "artifacts" / "qat" / "onnxruntime")
    return OpenedRun(folder, recipe, data, sim, artifact)


def print_machine(threads: int) -> None:
    """Prints the machine and the versions."""
    machine = describe_machine(threads)
    print(f"machine: {machine.cpu} ({machine.arch}; {' '.join(machine.features)}), {threads} thread(s)")
    print("versions: " + json.dumps(machine.versions))
