"""The cost of a training step under simulated quantization, against the FP32 step of the same model.

    python benchmarks/qat_step.py [--device cpu] [--batch 128] [--models ...] [--variants ...] [--json PATH]

A step is forward, cross-entropy, backward and SGD with momentum, in training mode, on random images of 3x32x32. In
every round each variant takes one step, in an order drawn anew, and its time is divided by the FP32 step's of that
round. Printed: the median of these ratios, its 95% interval (bootstrap over blocks of consecutive rounds, since what
slows a machine lasts for some), the 10th and 90th percentile, the median milliseconds, and the peak of memory that a
step adds to what is there between steps. On the CPU that peak is the largest resident size that Linux saw in a fresh
process of its own; there, large blocks of memory are given back at once, so that it counts what is in use and nothing
else. First of all each quantized variant must show that it quantizes (qat_checks.py), or the script stops.

    fp32, fp32-bf16     the model; under autocast in bfloat16
    fp32-folded         edgeqat's simulation before calibration: batch norms folded, nothing quantized
    fold, fold-bf16     edgeqat's default; under autocast
    live, lsq           edgeqat with live batch norms; with learned ranges of activations and weights
    fx, pt2e            torch.ao's FX mode and torchao's PT2E mode with the defaults for x86
    fx-frozen, pt2e-frozen     the same with observers off
    nncf                NNCF's quantize, where it is installed (3.4.0 runs with torch 2.13.0; it compiles an extension
                        when first used, which needs a C++ compiler and, on a slow machine,
                        NNCF_EXTENSION_LOAD_TIMEOUT=0)

Run it with nothing else running.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import random
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common import print_machine
from edgeqat.machine import describe_machine
from qat_checks import check_step
from qat_variants import FP32, FP32_BF16, MODELS, VARIANTS, NotAvailable, Setting, Step, make_setting, make_step

RESAMPLES, BLOCK_ROUNDS = 2000, 5
MIB = 2**20
MMAP_FROM = 65536
"""Bytes: blocks as large as this are returned to the system when they are freed."""


@dataclass(frozen=True)
class Ratio:
    """The median of the ratios of a round, its 95% interval, and where 80% of the ratios are."""

    median: float
    ci95: tuple[float, float]
    p10: float
    p90: float


def main() -> None:
    """Prints a block a model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--compile", action="store_true", help="torch.compile for FP32 and edgeqat")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--steps", type=int, default=20, help="rounds a repeat")
    parser.add_argument("--repeats", type=int, default=3, help="each builds everything anew")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--memory-alone", action="store_true", help=argparse.SUPPRESS)  # what a fresh process does
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory_alone:
        setting = make_setting(options.models[0], options.batch, "cpu", options.compile)
        print(resident_growth(make_step(options.variants[0], setting)))
        return
    print_machine(options.threads)
    if options.device == "cuda":
        print(f"device: {torch.cuda.get_device_name()}")
    print(f"batch {options.batch}, {options.repeats} x {options.steps} rounds" + ", compiled" * options.compile)
    measured = {model: measure(model, options) for model in options.models}
    if options.json is not None:
        machine = describe_machine(options.threads).to_dict()
        settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
        options.json.write_text(json.dumps({"machine": machine, "options": settings, "models": measured}, indent=1))


def measure(model: str, options: argparse.Namespace) -> dict[str, Any]:
    """Checks, times and prints all variants of one model."""
    wanted = list(dict.fromkeys([FP32, *options.variants]))
    setting = make_setting(model, options.batch, options.device, options.compile)
    print(f"{model}, {sum(p.numel() for p in setting.model.parameters())} parameters", flush=True)
    missing: dict[str, str] = {}
    times: dict[str, list[float]] = {}
    memory: dict[str, int] = {}
    for repeat in range(options.repeats):
        steps: dict[str, Step] = {}
        for name in (name for name in wanted if name not in missing):
            try:
                steps[name] = make_step(name, setting)
            except NotAvailable as error:
                missing[name] = str(error)
                print(f"  {name:<12} not available: {error}", flush=True)
                continue
            found = check_step(name, steps[name]) if repeat == 0 else ""
            if found:
                print(f"  {name:<12} checked: {found}", flush=True)
            if repeat == 0 and not options.no_memory:
                on_cpu = options.device == "cpu"
                memory[name] = in_fresh_process(model, name, options) if on_cpu else allocated_growth(steps[name])
        for name, milliseconds in rounds(steps, options.steps, seed=repeat).items():
            times.setdefault(name, []).extend(milliseconds)
        del steps
        gc.collect()
    return {"not_available": missing, "variants": report(times, memory)}


def rounds(steps: dict[str, Step], n: int, seed: int) -> dict[str, list[float]]:
    """Milliseconds of n steps of each variant, interleaved, in an order drawn anew each round.

    A first round is not counted: what was checked and measured in between may have to be compiled again.
    """
    found: dict[str, list[float]] = {name: [] for name in steps}
    order, drawn = list(steps), random.Random(seed)
    gc.collect()
    gc.disable()  # a collection in the middle of a step would be the variant's bad luck
    try:
        for i in range(-1, n):
            drawn.shuffle(order)
            for name in order:
                synchronize(steps[name].setting)
                started = time.perf_counter_ns()
                steps[name]()
                synchronize(steps[name].setting)
                if i >= 0:
                    found[name].append((time.perf_counter_ns() - started) / 1e6)
    finally:
        gc.enable()
    return found


def synchronize(setting: Setting) -> None:
    """Waits for what was left to run on the device."""
    if setting.device == "cuda":
        torch.cuda.synchronize()


def ratio(ours: list[float], theirs: list[float]) -> Ratio:
    """Of the times of the same rounds."""
    ratios = np.asarray(ours) / np.asarray(theirs)
    n = len(ratios)
    generator = np.random.default_rng(0)
    starts = generator.integers(0, n, (RESAMPLES, -(-n // BLOCK_ROUNDS), 1))
    drawn = ((starts + np.arange(BLOCK_ROUNDS)) % n).reshape(RESAMPLES, -1)[:, :n]
    low, high = np.percentile(np.median(ratios[drawn], axis=1), (2.5, 97.5))
    p10, median, p90 = np.percentile(ratios, (10, 50, 90))
    return Ratio(float(median), (float(low), float(high)), float(p10), float(p90))


def report(times: dict[str, list[float]], memory: dict[str, int]) -> dict[str, Any]:
    """Prints a line a variant; the figures for the JSON file, raw times included."""
    results: dict[str, Any] = {}
    for name, milliseconds in times.items():
        against = [FP32, FP32_BF16] if VARIANTS[name].autocast and FP32_BF16 in times else [FP32]
        ratios = {base: ratio(milliseconds, times[base]) for base in against if base != name}
        line = f"  {name:<12} {statistics.median(milliseconds):9.2f} ms"
        for base, r in ratios.items():
            interval = f"{r.ci95[0]:.3f} to {r.ci95[1]:.3f}, 10th to 90th percentile {r.p10:.3f} to {r.p90:.3f}"
            line += f", {r.median:.3f} of {base} ({interval})"
        if name in memory:
            line += f", step memory {memory[name] / MIB:.1f} MiB"
            line += f", {memory[name] / memory[FP32]:.3f} of {FP32}" * (name != FP32 and FP32 in memory)
        print(line + f", n {len(milliseconds)}", flush=True)
        results[name] = {
            "median_ms": statistics.median(milliseconds),
            "ratios": {base: asdict(r) for base, r in ratios.items()},
            "step_memory_bytes": memory.get(name),
            "samples_ms": milliseconds,
        }
    return results


def allocated_growth(step: Step) -> int:
    """Bytes that a step adds to what is allocated on the GPU between steps, at their peak."""
    step.optimizer.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated()) - before


def in_fresh_process(model: str, variant: str, options: argparse.Namespace) -> int:
    """`resident_growth` of a variant in a process of its own, whose allocator keeps no large block."""
    words = [sys.executable, __file__, "--memory-alone", "--models", model, "--variants", variant]
    words += ["--batch", str(options.batch), "--threads", str(options.threads)] + ["--compile"] * options.compile
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(MMAP_FROM), "MALLOC_TRIM_THRESHOLD_": str(MMAP_FROM)}
    done = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{variant}: measuring its memory failed: {done.stderr[-2000:]}")
    return int(done.stdout.split()[-1])


def resident_growth(step: Step) -> int:
    """Bytes that a step adds to this process's resident memory between steps, at their peak; Linux alone."""
    step.optimizer.zero_grad(set_to_none=True)
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to the present size
    before = status_bytes("VmRSS")
    step()
    return status_bytes("VmHWM") - before


def status_bytes(key: str) -> int:
    """An entry of /proc/self/status."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
