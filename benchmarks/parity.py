"""Bit-identity of the INT8 artifacts of finished runs, on every runtime and every engine.

    python benchmarks/parity.py RUN [RUN ...] [--samples 10000] [--engine-samples 2000]

For batch 1 and batch 128: the runtime's outputs against the integer reference and against the simulation in exact
mode; and once, every value with a grid inside the network against the reference. ONNX Runtime over `--samples` test
images, TorchScript over `--engine-samples` for each of its engines.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import edgeqat as eq
from common import OpenedRun, open_run, print_machine
from edgeqat.replay.kernels import EXACT_ENGINES

BATCHES = (1, 128)


def compare(
    run: OpenedRun, artifact: eq.Artifact, engine: str | None, batch_size: int, n: int
) -> tuple[int, int, int]:
    """(outputs, those of them equal to the reference, those equal to exact mode)."""
    program, session = eq.convert(run.sim), artifact.session(threads=1, engine=engine)
    name = artifact.arithmetic(engine)
    assert name is not None, "this machine's kernels have no known arithmetic"
    outputs = to_reference = to_exact = 0
    with run.sim.exact(name) as exact:
        for inputs, _ in run.test_batches(batch_size, n):
            found = session.run([inputs])[0]
            to_exact += int((found == exact(inputs)).sum())
            to_reference += int((found == eq.reference(program, inputs, name)).sum())
            outputs += found.numel()
    return outputs, to_reference, to_exact


def report(run: OpenedRun, artifact: eq.Artifact, engine: str | None, n: int) -> None:
    """Prints one line a batch size, and one for the values inside."""
    head = f"{run.folder.name}, {artifact.runtime}" + (f"/{engine}" if engine else "")
    for batch_size in BATCHES:
        total, to_reference, to_exact = compare(run, artifact, engine, batch_size, n)
        print(
            f"{head}: batch {batch_size}, {n} images, of {total} outputs {to_reference} equal the reference "
            f"({100 * to_reference / total:.4f}%), {to_exact} exact mode ({100 * to_exact / total:.4f}%)",
            flush=True,
        )
    found = eq.verify(artifact, eq.convert(run.sim), run.test_batches(128, n).inputs(), engine=engine)
    print(
        f"{head}: every value inside, {found.n} images: largest error {found.max_error_steps} steps, "
        f"first difference {found.first_difference}",
        flush=True,
    )


def main() -> None:
    """Every run, runtime and engine."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--samples", type=int, default=10000)
    parser.add_argument("--engine-samples", type=int, default=2000)
    options = parser.parse_args()
    print_machine(torch.get_num_threads())
    for folder in options.runs:
        run = open_run(folder)
        for runtime, artifact in run.artifacts.items():
            if runtime == "onnxruntime":
                report(run, artifact, None, options.samples)
                continue
            for engine in EXACT_ENGINES:
                report(run, artifact, engine, options.engine_samples)


if __name__ == "__main__":
    main()
