"""Bit-identity of the INT8 artifacts of finished runs, over the whole test split.

    python benchmarks/parity.py RUN [RUN ...]

For batch 1 and batch 128: logits of ONNX Runtime against the integer reference and against the simulation in exact
mode; and once, every value with a grid inside the network against the reference.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import edgeqat as eq
from common import OpenedRun, open_run, print_machine

BATCHES = (1, 128)


def compare(run: OpenedRun, batch_size: int) -> tuple[int, int, int, int]:
    """(samples, logits, those of them equal to the reference, those equal to exact mode)."""
    program = eq.convert(run.sim)
    session = run.artifact.session(threads=1)
    samples = logits = to_reference = to_exact = 0

    with run.sim.exact("onnxruntime") as exact:
        for inputs, _ in run.test_batches(batch_size):
            found = session.run([inputs])[0]
            to_exact += int((found == exact(inputs)).sum())
            to_reference += int((found == eq.reference(program, inputs)).sum())
            samples, logits = samples + len(found), logits + found.numel()
    return samples, logits, to_reference, to_exact


def main() -> None:
    """Prints one line a run and batch size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    options = parser.parse_args()
    print_machine(torch.get_num_threads())
    for folder in options.runs:
        run = open_run(folder)
        for batch_size in BATCHES:
            n, total, to_reference, to_exact = compare(run, batch_size)
            print(
                f"{folder.name}: batch {batch_size}, {n} images, of {total} logits {to_reference} equal the reference "
                f"({100 * to_reference / total:.4f}%), {to_exact} exact mode ({100 * to_exact / total:.4f}%)",
                flush=True,
            )
        parity = eq.verify(run.artifact, eq.convert(run.sim), run.test_batches(128).inputs())
        print(
            f"{folder.name}: every value inside, {parity.n} images: largest error {parity.max_error_steps} steps, "
            f"first difference {parity.first_difference}",
            flush=True,
        )


if __name__ == "__main__":
    main()
