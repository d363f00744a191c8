"""Does `verify` find and place a changed number? One scale by one unit in the last place, one weight, bias or zero
point by one step, in an ONNX file whose hashes are not checked.

    python benchmarks/mutations.py --data CIFAR10 --weights FOLDER [--models resnet20 ...] [--changes 100]
                                   [--images 1000]

The models are calibrated and not trained; --data and --weights as in benchmarks/parity.py. Every change that alters
any integer inside, or any output, must be named at an op that reads the changed number.
"""

from __future__ import annotations

import argparse
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx.numpy_helper
import torch

import edgeqat as eq
from common import print_machine
from edgeqat.data.batches import Batches
from edgeqat.data.sources import load
from edgeqat.lowering.qdq_cells import QdqGraph
from edgeqat.signature import Batch
from parity import BATCH, CALIBRATION_N, MEAN, STD, batches_of
from runtimes import MODELS, build

KINDS = ("scale", "zero point", "bias", "weight")


@dataclass(frozen=True)
class Change:
    """One number of a file.

    Attributes:
        kind: One of KINDS.
        tensor: Name of its initializer.
        index: Its place in it.
        up: Whether it grows.
    """

    kind: str
    tensor: str
    index: int
    up: bool


@dataclass(frozen=True)
class Outcome:
    """What verify said of a change: whether anything differed, and whether the op it named reads the number."""

    change: Change
    altered: bool
    named: str | None
    at_its_op: bool


def kinds_of(path: Path) -> dict[str, str]:
    """The kind of every initializer that a DequantizeLinear or QuantizeLinear reads."""
    found: dict[str, str] = {}
    model = onnx.load(path)
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type not in ("DequantizeLinear", "QuantizeLinear"):
            continue
        found[node.input[1]] = "scale"
        data = constants.get(node.input[0])
        if data is not None:
            found[node.input[0]] = "bias" if data.data_type == onnx.TensorProto.INT32 else "weight"
        elif len(node.input) > 2:
            found[node.input[2]] = "zero point"
    return found


def draw(path: Path, n: int, seed: int = 0) -> list[Change]:
    """n changes, the kinds in turn."""
    generator, kinds, changes = random.Random(seed), kinds_of(path), []
    sizes = {tensor.name: int(np.prod(tensor.dims, dtype=int)) for tensor in onnx.load(path).graph.initializer}
    for i in range(n):
        kind = KINDS[i % len(KINDS)]
        tensor = generator.choice(sorted(name for name, found in kinds.items() if found == kind))
        changes.append(Change(kind, tensor, generator.randrange(sizes[tensor]), generator.random() < 0.5))
    return changes


def apply(change: Change, source: Path, target: Path) -> None:
    """Writes the file with one number changed."""
    model = onnx.load(source)
    tensor = next(t for t in model.graph.initializer if t.name == change.tensor)
    array = onnx.numpy_helper.to_array(tensor).copy()
    flat = array.reshape(-1)
    if change.kind == "scale":
        flat[change.index] = np.nextafter(flat[change.index], np.float32(np.inf if change.up else 0))
    else:
        bounds, value = np.iinfo(flat.dtype), int(flat[change.index])
        moved = value + (1 if change.up else -1)
        flat[change.index] = moved if bounds.min <= moved <= bounds.max else 2 * value - moved
    tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    target.write_bytes(model.SerializeToString())


def judge(
    artifact: eq.Artifact, program: eq.QuantizedProgram, changes: Iterable[Change], batches: Sequence[Batch]
) -> list[Outcome]:
    """Verifies a copy of the artifact with each change."""
    readers: dict[str, set[str]] = {}
    for cell in QdqGraph(artifact.path).cells():
        op = artifact.manifest["outputs"].get(cell.output, {}).get("op", cell.output)
        for name in cell.constants:
            readers.setdefault(name, set()).add(op)
    outcomes = []
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "artifact"
        shutil.copytree(artifact.folder, copy)
        for change in changes:
            apply(change, artifact.path, copy / artifact.path.name)
            found = eq.verify(eq.load_artifact(copy, check=False), program, batches, check_hashes=False)
            altered = found.max_error_steps > 0 or found.bit_identical < 1
            named = found.first_difference
            outcomes.append(Outcome(change, altered, named, named in readers[change.tensor]))
    return outcomes


def main() -> None:
    """Prints one block a model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=["resnet20"])
    parser.add_argument("--changes", type=int, default=100)
    parser.add_argument("--images", type=int, default=1000)
    options = parser.parse_args()
    print_machine(torch.get_num_threads())
    data = load(options.data, image_size=32, mean=MEAN, std=STD, calibration_n=CALIBRATION_N)
    calibration = [x for x, _ in Batches(data.calibration, batch_size=BATCH, mean=MEAN, std=STD)]
    batches = [x for x, _ in batches_of(data, options.images, 250)]
    for name in options.models:
        sim = eq.calibrate(eq.prepare(build(name, options.weights), calibration[0]), calibration)
        program = eq.convert(sim)
        with tempfile.TemporaryDirectory() as folder:
            artifact = eq.lower(program, "onnxruntime", Path(folder) / name)
            outcomes = judge(artifact, program, draw(artifact.path, options.changes), batches)
        altered = [outcome for outcome in outcomes if outcome.altered]
        kinds = Counter(outcome.change.kind for outcome in altered)
        print(
            f"{name}: {options.changes} changes on {options.images} images, {len(altered)} alter an integer or "
            f"an output ({', '.join(f'{kind} {kinds[kind]}' for kind in KINDS)}); "
            f"{sum(outcome.at_its_op for outcome in altered)} of them are named at an op that reads the number"
        )
        for outcome in altered:
            if not outcome.at_its_op:
                print(f"  {outcome.change}: named {outcome.named}")


if __name__ == "__main__":
    main()
