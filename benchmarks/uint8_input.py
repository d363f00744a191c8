"""What it changes that a file takes uint8 pixels and not normalised floats: accuracy and latency after PTQ.

    python benchmarks/uint8_input.py [--weights FILE] [--data FOLDER] [--samples 10000] [--repeats 7]

Both simulations are calibrated on the same images. Printed: top-1 of the float model and of both INT8 files on
ONNX Runtime, bit-identity of both with the reference, and latencies of both INT8 files and of the float files with
either input, one thread, batch 1, interleaved call by call: medians over the repeats of ratios of medians. The float
file that takes pixels casts and normalises them in float, which changes no result. Then what normalising one image
costs a device that does it in numpy, as verify.py would.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

import edgeqat as eq
from common import print_machine
from edgeqat.data.batches import Batches
from edgeqat.data.dataset import Dataset
from edgeqat.data.sources import load
from edgeqat.factory import build_model
from edgeqat.measuring.latency import measure_latency
from edgeqat.metrics import evaluate, resolve_metric
from edgeqat.recipe import ModelSection
from edgeqat.replay.pixels import preprocess

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""What the float models of the zoo were trained with."""

FLOAT = eq.QConfigMapping().set_global(None)
PAIRS = (("int8 pixels", "int8"), ("float pixels", "float"), ("int8", "float"), ("int8 pixels", "float pixels"))
"""Whose latency is divided by whose."""


def lowered(
    model: nn.Module, data: Dataset, pixels: eq.Pixels | None, quantized: bool, folder: Path
) -> tuple[eq.QuantizedProgram, eq.Artifact]:
    """An ONNX file of the model, calibrated if it is quantized."""
    batches = Batches(data.calibration, batch_size=128, mean=MEAN, std=STD, pixels=pixels is not None)
    example = next(iter(batches.inputs()))[:2]
    mapping = None if quantized else FLOAT
    sim = eq.prepare(model, example, "onnxruntime", mapping, pixels=pixels).eval()
    if quantized:
        eq.calibrate(sim, batches.inputs())
    program = eq.convert(sim)
    return program, eq.lower(program, "onnxruntime", folder)


def report_latency(artifacts: Mapping[str, eq.Artifact], inputs: Mapping[str, list[Tensor]], repeats: int) -> None:
    """Prints a line a pair of files."""
    medians: list[dict[str, float]] = []
    for _ in range(repeats):
        fresh = {name: eq.load_artifact(artifact.folder) for name, artifact in artifacts.items()}
        found = measure_latency(fresh, inputs, 1)
        medians.append({name: latency.percentile(50) for name, latency in found.items()})
    for name in artifacts:
        each = [row[name] for row in medians]
        print(f"{name}: {statistics.median(each):.4f} ms, {artifacts[name].file_bytes} bytes")
    for ours, theirs in PAIRS:
        ratios = [row[ours] / row[theirs] for row in medians]
        low, high = min(ratios), max(ratios)
        print(f"{ours} / {theirs}: {statistics.median(ratios):.3f} ({low:.3f} to {high:.3f}, {repeats} repeats)")


def report_preprocessing(image: Tensor, calls: int = 2000) -> None:
    """Prints the time of what a file of pixels does without."""
    pixels = image.permute(0, 2, 3, 1).contiguous().numpy()
    for name, steps in (("normalised", {"mean": MEAN, "std": STD}), ("pixels", {"mean": None})):
        samples = []
        for _ in range(calls):
            started = time.perf_counter_ns()
            preprocess(pixels, dict(steps))
            samples.append((time.perf_counter_ns() - started) / 1e6)
        print(f"one image in numpy, {name}: {statistics.median(samples):.4f} ms, {calls} calls")


def main() -> None:
    """Accuracy, parity, then latency."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--weights", default=None)
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--samples", type=int, default=10000)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    print_machine(1)
    section = ModelSection(factory=f"edgeqat.zoo:{options.model}", args={"num_classes": 10}, weights=options.weights)
    model = build_model(section, 0).eval()
    data = load(options.data, image_size=32, mean=MEAN, std=STD, calibration_n=512)
    metric = resolve_metric("top1")
    pixels, test = eq.Pixels(MEAN, STD), data.test.take(torch.arange(options.samples))
    normalised, raw = (Batches(test, batch_size=128, mean=MEAN, std=STD, pixels=flag) for flag in (False, True))
    print(f"top-1 of {options.model} in float: {evaluate(model, normalised, metric).statistics.double().mean():.4f}")
    with tempfile.TemporaryDirectory() as folder:
        artifacts: dict[str, eq.Artifact] = {}
        for quantized in (False, True):
            for given, batches in ((None, normalised), (pixels, raw)):
                name = ("int8" if quantized else "float") + (" pixels" if given else "")
                program, artifacts[name] = lowered(model, data, given, quantized, Path(folder) / name)
                if quantized:
                    scores = evaluate(lambda x, a=artifacts[name]: a.run(x), batches, metric)
                    print(f"{name}: top-1 {scores.statistics.double().mean():.4f} on {len(test)} images", flush=True)
                    print(f"{name}: {eq.verify(artifacts[name], program, batches.inputs())}", flush=True)
        inputs = {name: [next(iter(raw if "pixels" in name else normalised))[0][:1]] for name in artifacts}
        report_latency(artifacts, inputs, options.repeats)
        report_preprocessing(inputs["int8 pixels"][0])


if __name__ == "__main__":
    main()
