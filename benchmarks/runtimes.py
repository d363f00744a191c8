"""INT8 against FP32 on every runtime that is installed: models x runtimes x threads x batch x image size.

    python benchmarks/runtimes.py [--models resnet20 ...] [--runtimes onnxruntime ...] [--threads 1 2]
                                  [--batches 1 32] [--sizes 32 224] [--repeats 5] [--weights FOLDER]

The two files of a runtime are timed call by call in turn, in one process; each repeat loads fresh sessions. Printed:
the median over the repeats of both medians and of their ratio, its smallest and largest. In ONNX Runtime the file that
`onnxruntime.quantization.quantize_static` makes of the same model (uint8 activations, int8 weights per channel) runs
beside them. Latency does not depend on the weights; those of --weights, a folder with MODEL-cifar10-float.safetensors,
are loaded where there are any. Run it with nothing else running.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import statistics
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

import edgeqat as eq
from common import print_machine
from edgeqat.lowering.onnx_session import OnnxSession
from edgeqat.machine import installed_runtimes
from edgeqat.measuring.latency import measure_latency
from edgeqat.zoo import edge_model, mobilenetv2_cifar, resnet8, resnet20

MODELS: Mapping[str, Callable[[], nn.Module]] = {
    "edge": edge_model,
    "resnet8": resnet8,
    "resnet20": resnet20,
    "mobilenetv2": mobilenetv2_cifar,
}
SEED = 0
CALIBRATION_N = 32


@dataclass(frozen=True)
class File:
    """A model file of no artifact folder, as `measure_latency` takes it."""

    data: bytes

    def session(self, threads: int) -> OnnxSession:
        """A fresh session."""
        return OnnxSession(self.data, threads)


def build(name: str, weights: Path | None) -> nn.Module:
    """A model of the zoo in eval mode, its statistics settled on random images."""
    torch.manual_seed(SEED)
    model = MODELS[name]()
    path = None if weights is None else weights / f"{name}-cifar10-float.safetensors"
    if path is not None and path.is_file():
        model.load_state_dict(safetensors.torch.load_file(path))
    return model.eval()


def lowered(model: nn.Module, x: Tensor, runtime: str, folder: Path) -> dict[str, eq.Artifact]:
    """The model's float and INT8 artifacts for a runtime."""
    everything = eq.QConfigMapping().set_global(None)
    found = {"FP32": eq.lower(eq.convert(eq.prepare(model, x, runtime, everything)), runtime, folder / "float")}
    sim = eq.calibrate(eq.prepare(model, x, runtime), [x])
    return found | {"INT8": eq.lower(eq.convert(sim), runtime, folder / "int8")}


def quantize_static(float_file: Path, x: Tensor, folder: Path) -> bytes:
    """The file that ONNX Runtime's own quantizer makes of a float file."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantType
    from onnxruntime.quantization import quantize_static as quantize
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        """The images, once."""

        def __init__(self, name: str) -> None:
            self._batches = iter([{name: x.numpy()}])

        def get_next(self) -> dict[str, Any] | None:
            """The next batch."""
            return next(self._batches, None)

    folder.mkdir()
    with contextlib.redirect_stdout(io.StringIO()):
        quant_pre_process(float_file, folder / "prepared.onnx", skip_symbolic_shape=True)
        reader = Reader(onnx.load(float_file).graph.input[0].name)
        types = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
        quantize(folder / "prepared.onnx", folder / "model.onnx", reader, per_channel=True, **types)
    return (folder / "model.onnx").read_bytes()


def compare(found: Mapping[str, Any], x: Tensor, threads: int, repeats: int) -> dict[str, list[float]]:
    """Medians of each file, one a repeat, in milliseconds."""
    medians: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(repeats):
        fresh = {n: a if isinstance(a, File) else eq.load_artifact(a.folder, check=False) for n, a in found.items()}
        latencies = measure_latency(fresh, {name: [x] for name in fresh}, threads)  # type: ignore[arg-type]
        for name, latency in latencies.items():
            medians[name].append(latency.percentile(50))
    return medians


def tell(head: str, medians: Mapping[str, list[float]], against: str) -> None:
    """One line: INT8 over something."""
    ratios = [ours / theirs for ours, theirs in zip(medians["INT8"], medians[against], strict=True)]
    print(
        f"{head}: INT8 {statistics.median(medians['INT8']):.4f} ms, {against} "
        f"{statistics.median(medians[against]):.4f} ms, ratio {statistics.median(ratios):.3f} "
        f"({min(ratios):.3f} to {max(ratios):.3f})",
        flush=True,
    )


def measure(name: str, size: int, runtime: str, options: argparse.Namespace) -> None:
    """Prints the lines of one model on one runtime."""
    model = build(name, options.weights)
    x = torch.randn(CALIBRATION_N, 3, size, size, generator=torch.Generator().manual_seed(SEED))
    with tempfile.TemporaryDirectory() as folder:
        found: dict[str, Any] = dict(lowered(model, x, runtime, Path(folder)))
        sizes = {kind: artifact.file_bytes for kind, artifact in found.items()}
        if runtime == "onnxruntime":
            data = quantize_static(found["FP32"].path, x, Path(folder) / "static")
            found["quantize_static"], sizes["quantize_static"] = File(data), len(data)
        print(f"{name}, {size}x{size}, {runtime}: bytes {sizes}", flush=True)
        for threads in options.threads:
            for batch in options.batches:
                medians = compare(found, x[:batch], threads, options.repeats)
                for against in set(found) - {"INT8"}:
                    tell(f"{name}, {size}x{size}, {runtime}, {threads} thread(s), batch {batch}", medians, against)


def main() -> None:
    """Prints the lines of every cell of the matrix."""
    here = [name for name, version in installed_runtimes().items() if version is not None]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--runtimes", nargs="+", choices=here, default=here)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--sizes", nargs="+", type=int, default=[32, 224])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--weights", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    print_machine(max(options.threads))
    for name in options.models:
        for size in options.sizes:
            for runtime in options.runtimes:
                measure(name, size, runtime, options)


if __name__ == "__main__":
    main()
