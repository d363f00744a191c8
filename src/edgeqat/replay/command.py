"""The command line of verify.py."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from edgeqat.replay.compare import FLOAT_TOLERANCE, Replay, choose_engine, replay_with, runner_of
from edgeqat.replay.folder import FolderError, check_hashes, outputs_in_order, read_manifest, read_safetensors
from edgeqat.replay.pixels import preprocess, read_image, steps_of
from edgeqat.replay.runner import Runner

WARM_UP_CALLS = 30


def predict(runners: Mapping[str, Runner], folder: Path, image: Path) -> str:
    """The labels of one image, best first, with the model's figures for them."""
    manifest = read_manifest(folder)
    check_hashes(folder, manifest)
    name = next(iter(manifest["inputs"]))
    steps = steps_of(manifest, name)
    if steps is None or len(manifest["inputs"]) != 1:
        raise FolderError("the manifest does not say how one image becomes this model's input")
    engine, _ = choose_engine(manifest)
    size = manifest["inputs"][name]["shape"][2:]
    feed = {name: preprocess(read_image(image, steps, size)[None], steps)}
    runner = runner_of(manifest, runners)
    outputs, _ = runner.run(folder / manifest["model"], engine, feed, outputs_in_order(manifest), b"")
    scores = next(iter(outputs.values()))[0].ravel()
    labels = (manifest["preprocessing"] or {}).get("labels") or [str(i) for i in range(len(scores))]
    best = np.argsort(-scores, kind="stable")[:5]
    return "\n".join(f"{labels[i] if i < len(labels) else i}\t{scores[i]:.4f}" for i in best)


def bench(runners: Mapping[str, Runner], folder: Path, threads: int, calls: int) -> str:
    """One line: how long a call on the first golden input takes on this device, loaded and warm."""
    manifest = read_manifest(folder)
    check_hashes(folder, manifest)
    golden, (engine, _) = read_safetensors(folder / "golden.safetensors"), choose_engine(manifest)
    feed = {name: golden[f"inputs/{name}"][:1].copy() for name in manifest["inputs"]}
    call = runner_of(manifest, runners).start(engine, threads)(folder / manifest["model"], feed)
    samples = []
    for _ in range(WARM_UP_CALLS + calls):
        started = time.perf_counter_ns()
        call()
        samples.append((time.perf_counter_ns() - started) / 1e6)
    p50, p90, p99 = np.percentile(samples[WARM_UP_CALLS:], (50, 90, 99))
    return f"{p50:.4f} ms a call (p90 {p90:.4f}, p99 {p99:.4f}; {calls} calls, batch 1, {threads} thread(s))"


def describe(result: Replay) -> str:
    """One line for a person."""
    share = f"{100 * result.identical:.2f}% of outputs bit-identical to {result.against} on {result.samples} samples"
    if result.passed and result.owed != "exact":
        inner = f"{result.inside} inner values bit-identical to {result.against}, " if result.inside else ""
        bound = f"wanted at most {FLOAT_TOLERANCE:g} of the largest one: two float32 libraries may round differently"
        if result.owed == "reported":
            bound = "not bounded, since floats were quantized again before them"
        worst = f"outputs on {result.samples} samples differ by at most {result.max_difference:.3g}"
        return f"verified: {inner}{worst} ({bound})"
    if result.passed:
        return f"verified: {share}"
    if not result.exact_here:
        return f"differs, first at {result.first_difference}: {share}; this machine's kernels have another arithmetic"
    return f"FAILED: {share}; the first op that differs is {result.first_difference}"


def main(runners: Mapping[str, Runner]) -> int:
    """The command line of verify.py."""
    parser = argparse.ArgumentParser(description="Replay an artifact's golden vectors on this device.")
    parser.add_argument("folder", nargs="?", type=Path, default=Path(sys.argv[0]).resolve().parent)
    parser.add_argument("--no-hash", action="store_true", help="do not check the files' hashes first")
    parser.add_argument("--image", type=Path, help="an image (needs Pillow) or a .npy array to run on instead")
    parser.add_argument("--bench", action="store_true", help="time calls on the first golden input instead")
    parser.add_argument("--threads", type=int, default=1, help="threads of --bench")
    parser.add_argument("--calls", type=int, default=1000, help="timed calls of --bench")
    options = parser.parse_args()
    try:
        if options.image is not None:
            print(predict(runners, options.folder, options.image))
            return 0
        if options.bench:
            print(bench(runners, options.folder, options.threads, options.calls))
            return 0
        result = replay_with(runners, options.folder, check=not options.no_hash)
    except FolderError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ImportError as error:
        print(f"error: {error}; pip install {'pillow' if error.name == 'PIL' else error.name}", file=sys.stderr)
        return 4
    print(describe(result))
    return 0 if result.passed or not result.exact_here else 3
