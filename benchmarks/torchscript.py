"""INT8 against FP32 latency in TorchScript, for every engine of torch, interleaved call by call.

    python benchmarks/torchscript.py [--sizes 32 64 96 128 224] [--repeats 5]

EdgeModel at these sizes and the other models of the zoo at 32x32, with random weights, which change no timing,
1 thread, batch 1. FP32 is the same model traced, frozen, saved and loaded, as the INT8 file is; beside it, the frozen
file after `torch.jit.optimize_for_inference`, which is a form that cannot be shipped (it is made after loading, and
not saved). Run it with nothing else running.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import edgeqat as eq
from common import print_machine
from edgeqat.lowering.engine import mean_macs
from edgeqat.lowering.session import Session
from edgeqat.replay.kernels import EXACT_ENGINES
from edgeqat.replay.run_torchscript import on_engine
from edgeqat.zoo import edge_model, mobilenetv2_cifar, resnet8, resnet20

ROUNDS_S = 4.0
WARM_UP_CALLS = 30
FP32, OPTIMIZED = "FP32", "FP32, optimize_for_inference"


def lowered(model: nn.Module, x: Tensor, folder: Path) -> tuple[eq.Artifact, eq.Artifact, float]:
    """(INT8, FP32, multiply-adds a quantized op)."""
    sim = eq.prepare(model, x, "torchscript")
    program = eq.convert(eq.calibrate(sim, [x]))
    int8 = eq.lower(program, "torchscript", folder / "int8")
    float_sim = eq.prepare(model, x, "torchscript", eq.QConfigMapping().set_global(None))
    return int8, eq.lower(eq.convert(float_sim), "torchscript", folder / "float"), mean_macs(program)


def calls(int8: eq.Artifact, float32: eq.Artifact, x: Tensor) -> dict[str, tuple[str, Callable[[], Any]]]:
    """By name: the engine a call needs, and the call."""
    found: dict[str, tuple[str, Callable[[], Any]]] = {}

    def call(session: Session) -> Callable[[], Any]:
        feed = session.feed([x])
        return lambda: session.run_raw(feed)

    for engine in EXACT_ENGINES:
        found[engine] = (engine, call(int8.session(1, engine)))
    found[FP32] = ("x86", call(float32.session(1)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimized = torch.jit.optimize_for_inference(torch.jit.load(str(float32.path)))  # type: ignore[no-untyped-call]

    def run_optimized() -> Any:
        with torch.no_grad():
            return optimized(x)

    found[OPTIMIZED] = ("x86", run_optimized)
    return found


def medians(timed: dict[str, tuple[str, Callable[[], Any]]]) -> dict[str, float]:
    """Median milliseconds of each call, all in turn, in an order drawn anew each round."""
    samples: dict[str, list[float]] = {name: [] for name in timed}
    for engine, run in timed.values():
        with on_engine(engine):
            for _ in range(WARM_UP_CALLS):
                run()
    order = list(timed)
    deadline = time.perf_counter() + ROUNDS_S
    while time.perf_counter() < deadline:
        random.shuffle(order)
        for name in order:
            engine, run = timed[name]
            with on_engine(engine):
                run()  # untimed: another form's call has filled the caches
                started = time.perf_counter_ns()
                run()
                samples[name].append((time.perf_counter_ns() - started) / 1e6)
    return {name: statistics.median(found) for name, found in samples.items()}


def spread(values: list[float]) -> str:
    """Median and range."""
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def report(name: str, model: nn.Module, size: int, repeats: int) -> None:
    """Prints one line a form."""
    x = torch.randn(2, 3, size, size)
    with tempfile.TemporaryDirectory() as folder:
        int8, float32, macs = lowered(model.eval(), x, Path(folder))
        timed = calls(int8, float32, x[:1].contiguous())
        rounds = [medians(timed) for _ in range(repeats)]
        sizes = int8.file_bytes, float32.file_bytes
    print(
        f"{name}, 3x{size}x{size}: INT8 {sizes[0]} bytes, FP32 {sizes[1]} bytes, "
        f"{macs / 1e6:.2f} M multiply-adds an op, default engine {int8.engine}"
    )
    for form in timed:
        line = f"  {form:<30} {spread([r[form] for r in rounds])} ms"
        if form not in (FP32, OPTIMIZED):
            line += f", FP32 / INT8 {spread([r[FP32] / r[form] for r in rounds])}"
            line += f", optimised FP32 / INT8 {spread([r[OPTIMIZED] / r[form] for r in rounds])}"
        print(line, flush=True)


def main() -> None:
    """Both models, every size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 64, 96, 128, 224])
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    random.seed(0)
    print_machine(1)
    for size in options.sizes:
        report("EdgeModel", edge_model(), size, options.repeats)
    for name, factory in (("ResNet-8", resnet8), ("ResNet-20", resnet20), ("MobileNetV2", mobilenetv2_cifar)):
        report(name, factory(), 32, options.repeats)


if __name__ == "__main__":
    main()
