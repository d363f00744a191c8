"""From FP32 training to verified INT8 files in ONNX and TorchScript, with size, latency and accuracy of each.

    python examples/full_pipeline.py [--epochs 6] [--qat-epochs 2] [--out runs/example]

Handwritten digits, which need no download; a minute on two cores. `edgeqat run` does this and more from a recipe.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch

import edgeqat as eq
from edgeqat.data.batches import Batches
from edgeqat.data.sources import load
from edgeqat.zoo import edge_model

RUNTIMES = ("onnxruntime", "torchscript")


def main() -> None:
    """Prints a line a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--qat-epochs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/example"))
    options = parser.parse_args()
    torch.manual_seed(0)

    data = load("digits", image_size=32, mean=None, std=None, calibration_n=128)
    training = Batches(data.train, batch_size=32, mean=data.mean, std=data.std, shuffle=True, drop_last=True)
    testing = Batches(data.test, batch_size=64, mean=data.mean, std=data.std)
    calibration = [inputs for inputs, _ in Batches(data.calibration, batch_size=32, mean=data.mean, std=data.std)]

    # 1. The float model; and once more with the budget of the quantized one, for a fair comparison.
    model = edge_model()
    eq.fit(model, training, epochs=options.epochs, lr=0.05, exact=None)
    twin = copy.deepcopy(model)
    eq.fit(twin, training, epochs=options.qat_epochs, lr=0.005, max_grad_norm=1.0, exact=None)

    # 2. Quantization-aware training, for both runtimes at once.
    sim = eq.calibrate(eq.prepare(model, calibration[0], target=RUNTIMES), calibration)
    eq.fit(sim, training, epochs=options.qat_epochs, lr=0.005, max_grad_norm=1.0)
    program = eq.convert(sim)

    # 3. The files: INT8, and its FP32 twin in the same runtime.
    in_float = eq.QConfigMapping().set_global(None)
    twin_program = eq.convert(eq.prepare(twin, calibration[0], qconfig_mapping=in_float))
    for runtime in RUNTIMES:
        int8 = eq.lower(program, runtime, options.out / runtime / "int8")
        fp32 = eq.lower(twin_program, runtime, options.out / runtime / "fp32")

        # 4. The proof, then the figures.
        parity = eq.verify(int8, program, [inputs for inputs, _ in testing])
        before, after = eq.measure([fp32, int8], testing, metric="top1", threads=1, batch=1)
        print(
            f"{runtime}: {100 * parity.bit_identical:.2f}% of the logits bit-identical; "
            f"top-1 {100 * before.metric.value:.2f}% -> {100 * after.metric.value:.2f}%, "
            f"{before.file_bytes} -> {after.file_bytes} bytes, "
            f"{before.latency.percentile(50):.4f} -> {after.latency.percentile(50):.4f} ms"
        )


if __name__ == "__main__":
    main()
