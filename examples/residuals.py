"""Residual additions, products and concatenations: each value has a grid of its own.

    python examples/residuals.py

An addition of integers is only right if both operands and the sum have their own scales: the kernel rescales. Written
as `+`, `+=`, `torch.add` or FloatFunctional.add, it is the same op here, and needs no wrapper.
"""

from __future__ import annotations

import tempfile

import torch
from torch import Tensor, nn

import edgeqat as eq


class Residuals(nn.Module):
    """The ways to combine two branches that models are written with."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 3, padding=1)
        self.gate, self.last = nn.Conv2d(8, 8, 1), nn.Conv2d(16, 4, 1)
        self.skip_add = nn.quantized.FloatFunctional()

    def forward(self, x: Tensor) -> Tensor:
        """Combines two branches by additions, a gate and a concatenation."""
        left, right = self.left(x), self.right(x) * 4.0  # the branches differ in range
        y = self.skip_add.add(left, right)  # FloatFunctional, as torch.ao wants it
        y = torch.relu(left + y)  # an operator, with the ReLU fused
        y = y * torch.sigmoid(self.gate(y.mean((2, 3), keepdim=True)))  # a gate of another shape: broadcast
        result: Tensor = self.last(torch.cat([y, left], 1))
        return result


def main() -> None:
    """Prints the grid of every value, and what the file's integers are against the reference."""
    torch.manual_seed(0)
    images = torch.randn(16, 3, 16, 16)
    sim = eq.calibrate(eq.prepare(Residuals().eval(), images), [images])
    program = eq.convert(sim)
    for op in program.ops:
        if op.kind.value in ("add", "mul", "concat", "lookup"):
            grids = [program.grid_of(name).describe() for name in (*op.inputs, op.name)]
            print(f"{op.name}: {op.kind.value} of {' and '.join(grids[:-1])} -> {grids[-1]}")
    with tempfile.TemporaryDirectory() as folder:
        artifact = eq.lower(program, "onnxruntime", f"{folder}/artifact")
        parity = eq.verify(artifact, program, [images])
        kernels = {k: n for k, n in artifact.manifest["coverage"]["runtime_ops"].items() if k.startswith("QLinear")}
    print(f"ONNX Runtime runs {kernels}: {100 * parity.bit_identical:.0f}% of the outputs are bit-identical")


if __name__ == "__main__":
    main()
