"""Speed of INT8 against FP32 by the activation function of a network, on three runtimes.

    python benchmarks/activations.py [--sizes 64 160] [--activations relu silu hardswish]

The network: a stem and four inverted bottlenecks (expand 1x1, depthwise 3x3, project 1x1), 32 to 128 channels,
with random weights, which latency does not depend on. For each activation and image size the FP32 and INT8 files of
all runtimes are timed call by call in turn, in an order drawn anew each round, 1 thread, batch 1. Printed: medians,
their ratio with its 95% interval (paired block bootstrap over rounds), and, where the runtime has a profiler, the
INT8 file's three slowest kinds of op with their share of the time.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import edgeqat as eq
from common import print_machine
from edgeqat.measuring.bench import latency_ratio
from edgeqat.measuring.latency import measure_latency
from edgeqat.measuring.profile import profile_ops

RUNTIMES = ("onnxruntime", "executorch", "litert")
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"relu": nn.ReLU, "silu": nn.SiLU, "hardswish": nn.Hardswish}
FLOAT = eq.QConfigMapping().set_global(None)


class Bottleneck(nn.Module):
    """Expand, depthwise, project; a residual where the shapes allow it."""

    def __init__(self, channels: int, out: int, stride: int, activation: Callable[[], nn.Module]) -> None:
        super().__init__()
        wide = 2 * channels
        self.body = nn.Sequential(
            nn.Conv2d(channels, wide, 1),
            activation(),
            nn.Conv2d(wide, wide, 3, stride, 1, groups=wide),
            activation(),
            nn.Conv2d(wide, out, 1),
        )
        self.residual = stride == 1 and channels == out

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return x + y if self.residual else y


def network(activation: Callable[[], nn.Module]) -> nn.Module:
    """The network that is timed."""
    torch.manual_seed(0)
    shapes = ((32, 32, 1), (32, 64, 2), (64, 64, 1), (64, 128, 2))
    blocks = [Bottleneck(*shape, activation) for shape in shapes]
    stem = [nn.Conv2d(3, 32, 3, 2, 1), activation()]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10)).eval()


def measure(name: str, size: int, folder: Path) -> None:
    """Prints a line a runtime."""
    model, x = network(ACTIVATIONS[name]), torch.randn(8, 3, size, size)
    program = eq.convert(eq.calibrate(eq.prepare(model, x, target=RUNTIMES), [x]))
    twin = eq.convert(eq.prepare(model, x, qconfig_mapping=FLOAT))
    files = {}
    for runtime in RUNTIMES:
        files[f"{runtime} fp32"] = eq.lower(twin, runtime, folder / f"{runtime}-fp32")
        files[f"{runtime} int8"] = eq.lower(program, runtime, folder / f"{runtime}-int8")
    found = measure_latency(files, {key: [x[:1]] for key in files}, threads=1)
    for runtime in RUNTIMES:
        fp32, int8 = (found[f"{runtime} {kind}"] for kind in ("fp32", "int8"))
        ratio = latency_ratio(fp32.samples_ms, int8.samples_ms)
        slowest = profile_ops(files[f"{runtime} int8"])
        total = sum(op.ms for op in slowest)
        shares = ", ".join(f"{op.op} {100 * op.ms / total:.0f}%" for op in slowest[:3]) or "no profiler"
        print(
            f"| {name} | {size} | {runtime} | {fp32.percentile(50):.3f} | {int8.percentile(50):.3f} | "
            f"{ratio.value:.2f}x ({ratio.low:.2f}-{ratio.high:.2f}) | {len(int8.samples_ms)} | {shares} |",
            flush=True,
        )


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 160])
    parser.add_argument("--activations", nargs="+", choices=list(ACTIVATIONS), default=list(ACTIVATIONS))
    arguments = parser.parse_args()
    print_machine(1)
    print("| activation | image | runtime | FP32, ms | INT8, ms | FP32 / INT8 (95%) | n | slowest ops of INT8 |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name in arguments.activations:
        for size in arguments.sizes:
            with tempfile.TemporaryDirectory() as folder:
                measure(name, size, Path(folder))


if __name__ == "__main__":
    main()
