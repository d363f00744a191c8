"""Bit-identity of artifacts on every runtime and engine, over CIFAR-10 test images.

    python benchmarks/parity.py --data CIFAR10 --weights FOLDER [--models resnet20 ...] [--runtimes onnxruntime ...]
                                [--bits W A] [--samples 10000] [--engine-samples 2000] [--single-samples 500]

Each model of the zoo is calibrated, not trained, planned for each runtime alone, and lowered. Printed, over the test
images in batches of 128: the runtime's logits against the integer reference and every value inside against it, its
predictions, and top-1; over the first `--single-samples` of them, at batch 1, its logits against the simulation in
exact mode. --bits are those of weights and activations, by default 8 and 8. The main engine of each runtime takes
`--samples` images, the other engines `--engine-samples`. --data is a recipe's data.source; --weights a folder with
MODEL-cifar10-float.safetensors, without one weights are random.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

import edgeqat as eq
from common import print_machine
from edgeqat.data.batches import Batches
from edgeqat.data.dataset import Dataset
from edgeqat.data.sources import load
from edgeqat.machine import arithmetic_here, installed_runtimes
from edgeqat.replay.kernels import ENGINES
from runtimes import MODELS, build

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Those that the float weights were trained with."""

CALIBRATION_N = 512
BATCH = 128


def batches_of(data: Dataset, n: int, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The first n test images with their labels."""
    yield from Batches(data.test.take(torch.arange(n)), batch_size=size, mean=MEAN, std=STD)


def top1(artifact: eq.Artifact, engine: str | None, data: Dataset, n: int) -> float:
    """The share of n test images that an artifact classifies rightly."""
    session = artifact.session(engine=engine)
    right = sum(int((session.run([x])[0].argmax(1) == y).sum()) for x, y in batches_of(data, n, BATCH))
    return right / n


def exact_mode(sim: eq.SimulatedModel, artifact: eq.Artifact, engine: str | None, data: Dataset, n: int) -> str:
    """How many logits of n images, one at a time, are those of the simulation in exact mode."""
    name = artifact.arithmetic(engine)
    if name is None or n == 0:
        return "exact mode not compared"
    session, equal, total = artifact.session(engine=engine), 0, 0
    with sim.exact(name) as exact:
        for x, _ in batches_of(data, n, 1):
            found = session.run([x])[0]
            equal, total = equal + int((found == exact(x)).sum()), total + found.numel()
    return f"exact mode {equal} of {total} at batch 1"


def report(name: str, runtime: str, data: Dataset, options: argparse.Namespace, folder: Path) -> None:
    """Prints a line for every engine of a runtime."""
    model = build(name, options.weights)
    calibration = [x for x, _ in Batches(data.calibration, batch_size=BATCH, mean=MEAN, std=STD)]
    weights, activations = options.bits
    qconfig = eq.QConfig(eq.ActivationConfig(bits=activations), eq.WeightConfig(bits=weights))
    sim = eq.calibrate(eq.prepare(model, calibration[0], runtime, qconfig), calibration).eval()
    program = eq.convert(sim)
    artifact = eq.lower(program, runtime, folder / runtime, golden_inputs=calibration[0][:16])
    main = artifact.engine
    engines = [main, *(e for e in ENGINES[runtime] if e != main and arithmetic_here(f"{runtime}/{e}") is not None)]
    for engine in engines:
        n = options.samples if engine == main and runtime != "torchscript" else options.engine_samples
        images = (x for x, _ in batches_of(data, n, BATCH))
        found = eq.verify(artifact, program, images, engine=engine)
        inside = sum(value.n for value in found.values)
        print(
            f"{name} W{weights}A{activations}, {runtime}/{engine}: {artifact.file_bytes} bytes, {n} images, "
            f"{100 * found.bit_identical:.4f}% of logits those of "
            f"{found.against}, agreement {100 * found.agreement:.2f}%; inside {inside} integers of "
            f"{len(found.values)} values, off by steps {found.histogram}, {len(found.unseen)} values not to be seen; "
            f"first difference {found.first_difference}; top-1 {100 * top1(artifact, engine, data, n):.2f}%; "
            f"{exact_mode(sim, artifact, engine, data, options.single_samples)}",
            flush=True,
        )


def main() -> None:
    """Every model and runtime."""
    here = [name for name, version in installed_runtimes().items() if version is not None]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--runtimes", nargs="+", choices=here, default=here)
    parser.add_argument("--bits", nargs=2, type=int, default=[8, 8], metavar=("W", "A"))
    parser.add_argument("--samples", type=int, default=10000)
    parser.add_argument("--engine-samples", type=int, default=2000)
    parser.add_argument("--single-samples", type=int, default=500)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    print_machine(torch.get_num_threads())
    data = load(options.data, image_size=32, mean=MEAN, std=STD, calibration_n=CALIBRATION_N)
    for name in options.models:
        for runtime in options.runtimes:
            with tempfile.TemporaryDirectory() as folder:
                report(name, runtime, data, options, Path(folder))


if __name__ == "__main__":
    main()
