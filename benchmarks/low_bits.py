"""What few bits cost and save: files of 8- and 4-bit weights and activations, timed in turn.

    python benchmarks/low_bits.py [--models resnet20 ...] [--runtimes onnxruntime executorch] [--threads 1]
                                  [--repeats 5] [--weights FOLDER]

Each model of the zoo at each pair of widths, calibrated on random images, as one runtime's file: its bytes and its
weights and biases alone; the median over the repeats of its median latency and of the processor time to load it, as
ratios to W8A8, all files call by call in turn in one process. Run it with nothing else running.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import torch

import edgeqat as eq
from common import print_machine
from edgeqat.measuring.latency import measure_latency
from runtimes import CALIBRATION_N, MODELS, SEED, build

WIDTHS = ((8, 8), (4, 8), (8, 4), (4, 4))
"""(bits of weights, bits of activations); the first is what others are compared with."""

LOADS = 10
"""Times that each file is loaded in a repeat."""


def lowered(name: str, runtime: str, weights: Path | None, x: torch.Tensor, folder: Path) -> dict[str, eq.Artifact]:
    """A model's artifacts by their widths."""
    found = {}
    for w, a in WIDTHS:
        qconfig = eq.QConfig(eq.ActivationConfig(bits=a), eq.WeightConfig(bits=w))
        sim = eq.calibrate(eq.prepare(build(name, weights), x, runtime, qconfig), [x])
        found[f"W{w}A{a}"] = eq.lower(eq.convert(sim), runtime, folder / f"{w}{a}")
    return found


def load_times(artifacts: dict[str, eq.Artifact]) -> dict[str, float]:
    """The median processor time to load each, in milliseconds."""
    samples: dict[str, list[float]] = {name: [] for name in artifacts}
    for _ in range(LOADS):
        for name, artifact in artifacts.items():
            fresh = eq.load_artifact(artifact.folder, check=False)
            start = time.process_time()
            fresh.session()
            samples[name].append(1000 * (time.process_time() - start))
    return {name: statistics.median(found) for name, found in samples.items()}


def report(name: str, runtime: str, options: argparse.Namespace) -> None:
    """Prints a line for every pair of widths."""
    x = torch.randn(CALIBRATION_N, 3, 32, 32, generator=torch.Generator().manual_seed(SEED))
    with tempfile.TemporaryDirectory() as folder:
        artifacts = lowered(name, runtime, options.weights, x, Path(folder))
        runs: dict[str, list[float]] = {key: [] for key in artifacts}
        loads: dict[str, list[float]] = {key: [] for key in artifacts}
        for _ in range(options.repeats):
            fresh = {key: eq.load_artifact(a.folder, check=False) for key, a in artifacts.items()}
            latencies = measure_latency(fresh, {key: [x[:1]] for key in fresh}, options.threads)
            for key, latency in latencies.items():
                runs[key].append(latency.percentile(50))
            for key, ms in load_times(artifacts).items():
                loads[key].append(ms)
        first = next(iter(artifacts))
        for key, artifact in artifacts.items():
            run, load = (
                statistics.median(a / b for a, b in zip(t[key], t[first], strict=True)) for t in (runs, loads)
            )
            print(
                f"{name} {key}, {runtime}: {artifact.file_bytes} bytes, weights and biases "
                f"{artifact.manifest['payload_bytes']}; {statistics.median(runs[key]):.4f} ms, {run:.3f} of {first}; "
                f"loads in {statistics.median(loads[key]):.2f} ms, {load:.3f} of {first}",
                flush=True,
            )


def main() -> None:
    """Every model and runtime."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=["resnet8", "resnet20"])
    parser.add_argument("--runtimes", nargs="+", default=["onnxruntime", "executorch"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--weights", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    print_machine(options.threads)
    for name in options.models:
        for runtime in options.runtimes:
            report(name, runtime, options)


if __name__ == "__main__":
    main()
