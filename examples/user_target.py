"""A target of your own: ResNet-20 for an NPU that a YAML file describes, lowered and proved on ONNX Runtime.

    python examples/user_target.py

examples/npu.yaml stands for a device that wants symmetric activations and one scale per weight, each a power of two,
so that a requantization is a shift. Its path is given wherever a target's name is.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import torch

import edgeqat as eq
from edgeqat.zoo import resnet20

NPU = str(Path(__file__).with_name("npu.yaml"))


def main() -> None:
    """Plans, calibrates on random images, lowers, verifies, and prints the scales of the first layers."""
    torch.manual_seed(0)
    model = resnet20().eval()
    images = torch.randn(16, 3, 32, 32)

    sim = eq.prepare(model, images, target=NPU)
    eq.calibrate(sim, [images])
    program = eq.convert(sim)
    with TemporaryDirectory() as folder:
        artifact = eq.lower(program, NPU, Path(folder) / "npu")
        parity = eq.verify(artifact, program, [images])
    print(f"{artifact.manifest['target']}, run by {artifact.runtime}")
    print(f"{100 * parity.bit_identical:g}% of the outputs are bit-identical to {parity.against}")

    convs = [op for op in program.ops if op.weight is not None]
    for op in convs[:4]:
        scale, zero_point = program.grid_of(op.name).per_tensor()
        weight = float(program.consts[str(op.weight)].grid.filled()[0])
        print(f"{op.name}: weight {exponent(weight)}, output {exponent(scale)}, zero point {zero_point}")


def exponent(scale: float) -> str:
    """A power of two in words; any other number would show as it is."""
    mantissa, power = torch.frexp(torch.tensor(scale))
    return f"2**{int(power) - 1}" if float(mantissa) == 0.5 else f"{scale:g}"


if __name__ == "__main__":
    main()
