"""INT8 artifacts on 64-bit ARM, by emulation, against their own golden vectors.

    python benchmarks/arm.py --data CIFAR10 --weights FOLDER [--models resnet20 ...] [--runtimes onnxruntime]
                             [--images 1000] [--cpus max cortex-a72]

Each model is calibrated, not trained, and lowered with test images as its golden inputs; the `verify.py` of its folder
then runs under emulation (tools/arm_emulation.py), on the runtime's wheel for aarch64, and compares every output and
every value inside with the arithmetic of that machine. Printed beside it: how many outputs of that arithmetic are not
those of the first one, that of x86. --data and --weights as in benchmarks/runtimes.py and in recipes.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

import edgeqat as eq
from common import print_machine
from edgeqat.data.batches import Batches
from edgeqat.data.sources import load
from runtimes import MODELS, build

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import arm_emulation

PART = 100
"""Images of one folder: every value inside is held at once."""

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def images_of(data: str, n: int) -> tuple[Tensor, Tensor]:
    """Calibration images and n test images, normalised, float32 [N, 3, 32, 32]."""
    found = load(data, image_size=32, mean=MEAN, std=STD, calibration_n=512)
    test = found.test.take(torch.arange(n))
    parts = (Batches(split, batch_size=512, mean=MEAN, std=STD) for split in (found.calibration, test))
    calibration, images = (torch.cat([x for x, _ in part]).contiguous() for part in parts)
    return calibration, images


def of_another_arithmetic(folder: Path, manifest: dict[str, Any]) -> tuple[int, int]:
    """(outputs of the last arithmetic of the golden vectors that are not those of the first, outputs)."""
    golden = safetensors.torch.load_file(folder / "golden.safetensors")
    names = manifest["arithmetics"]
    first, last = (manifest["golden"][name] for name in (names[0], names[-1]))
    pairs = [(golden[f"{first}/outputs/{n}"], golden[f"{last}/outputs/{n}"]) for n in manifest["outputs"]]
    changed = sum(int((one != other).sum()) for one, other in pairs)
    return changed, sum(one.numel() for one, _ in pairs)


def report(name: str, program: eq.QuantizedProgram, runtime: str, images: Tensor, cpus: list[str]) -> None:
    """Prints a line for each processor."""
    lines: dict[str, set[str]] = {cpu: set() for cpu in cpus}
    changed = outputs = 0
    for part in images.split(PART):
        with tempfile.TemporaryDirectory() as place:
            artifact = eq.lower(program, runtime, Path(place) / "artifact", golden_inputs=part)
            counts = of_another_arithmetic(artifact.folder, artifact.manifest)
            changed, outputs = changed + counts[0], outputs + counts[1]
            for cpu in cpus:
                words = arm_emulation.command(artifact.folder / "verify.py", cpu=cpu)
                ended = subprocess.run(words, env=arm_emulation.environment(), capture_output=True, text=True)
                lines[cpu].add(ended.stdout.strip() or ended.stderr.strip().splitlines()[-1])
    for cpu in cpus:
        print(f"{name}, {runtime}, {cpu}: {len(images)} images in parts of {PART}: {' | '.join(sorted(lines[cpu]))}")
    print(f"{name}, {runtime}: {changed} of {outputs} outputs are not those of x86", flush=True)


def main() -> None:
    """Every model and runtime."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--models", nargs="+", default=["edge", "resnet20", "mobilenetv2"], choices=MODELS)
    parser.add_argument("--runtimes", nargs="+", default=["onnxruntime"])
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--cpus", nargs="+", default=list(arm_emulation.CPUS))
    options = parser.parse_args()
    if not arm_emulation.is_installed():
        raise SystemExit("error: there is no emulated root; run `python tools/arm_emulation.py install` first")
    print_machine(torch.get_num_threads())
    print("emulated: " + ", ".join(arm_emulation.versions()))
    calibration, images = images_of(options.data, options.images)
    for name in options.models:
        model = build(name, options.weights)
        for runtime in options.runtimes:
            sim = eq.calibrate(eq.prepare(model, calibration[:2], runtime), calibration.split(128))
            report(name, eq.convert(sim), runtime, images, options.cpus)


if __name__ == "__main__":
    main()
