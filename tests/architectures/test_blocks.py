from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import edgeqat as eq
from architectures.blocks import BLOCKS, Block
from edgeqat.lowering.golden import what_is_owed
from edgeqat.program import Kind
from helpers import EXACT_ARITHMETIC
from models import shake

FLOAT_NODES = frozenset(
    {
        *("Conv", "FusedConv", "ConvTranspose", "Gemm", "FusedGemm", "MatMul", "FusedMatMul", "BatchNormalization"),
        *("Add", "Sub", "Mul", "Div", "Sum", "Sigmoid", "HardSigmoid", "HardSwish", "QuickGelu", "Gelu", "Erf"),
        *("Tanh", "Relu", "LeakyRelu", "AveragePool", "GlobalAveragePool", "ReduceMean", "Softmax"),
    }
)
"""Nodes of an optimised ONNX graph that compute in float."""

STEPS_AFTER_FLOAT = 1.0
"""Two libraries' float kernels differ in the last bits of float32, which moves an integer made from them by one step
where it lies between two. Measured: 0 steps in each of these blocks.
"""

AGREEMENT_AFTER_FLOAT = 18 / 19
"""Such a step may turn a near tie of an untrained network's logits, in one of the 19 samples."""


def calibrated(block: Block, model: nn.Module) -> eq.SimulatedModel:
    sim = eq.prepare(model, inputs(block, 0))
    return eq.calibrate(sim, [inputs(block, 0), inputs(block, 1)])


def inputs(block: Block, seed: int, n: int = 8) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(n, *shape, generator=generator) for shape in block.shapes)


def gradients(model: nn.Module, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """One step of SGD in train mode; the gradients of the parameters that it reached."""
    model.train()
    outputs = pytree.tree_leaves(model(*batch))
    loss = sum(((y - torch.linspace(-1, 1, y.numel()).reshape(y.shape)) ** 2).mean() for y in outputs)
    assert isinstance(loss, Tensor) and bool(torch.isfinite(loss))
    loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.01).step()
    model.eval()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None and bool((p.grad != 0).any())}


@EXACT_ARITHMETIC
@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_trains_and_its_artifact_is_proved(name: str, tmp_path: Path) -> None:
    block = BLOCKS[name]
    model = shake(block.factory()).eval()
    sim = calibrated(block, copy.deepcopy(model))
    reached, reached_in_float = gradients(sim, inputs(block, 2)), gradients(model, inputs(block, 2))
    trained = {n for n, p in sim.named_parameters() if p.requires_grad}
    assert trained - set(reached) <= {n for n, _ in model.named_parameters()} - set(reached_in_float)
    assert all(bool(torch.isfinite(g).all()) for g in reached.values())

    program = eq.convert(sim)
    artifact = eq.lower(program, "onnxruntime", tmp_path / "artifact")
    parity = eq.verify(artifact, program, [inputs(block, 3, 16), inputs(block, 4, 3)])
    assert parity.exact_here and parity.n == 19
    if block.conv_net:
        check_no_float_inside(program, artifact)
        assert (parity.bit_identical, parity.max_error_steps, parity.first_difference) == (1.0, 0.0, None)
        assert parity.agreement == 1.0
    else:
        check_reasons(program)
        owed = what_is_owed(program)
        assert parity.first_difference is None or owed[parity.first_difference] != "exact"
        assert parity.max_error_steps <= STEPS_AFTER_FLOAT and parity.agreement >= AGREEMENT_AFTER_FLOAT


def check_no_float_inside(program: eq.QuantizedProgram, artifact: eq.Artifact) -> None:
    """Floats become integers once, where they come in, and integers floats once, where they go out."""
    assert [f"{o.aten}: {o.reason}" for o in program.float_origins()] == []
    quantized = [op.inputs[0] for op in program.ops if op.kind is Kind.QUANTIZE]
    dequantized = [op.name for op in program.ops if op.kind is Kind.DEQUANTIZE]
    assert set(quantized) <= set(program.inputs) and set(dequantized) <= set(program.outputs)
    ops = artifact.manifest["coverage"]["runtime_ops"]
    assert not FLOAT_NODES & set(ops), ops
    # With the kernels between them, these would be float as well, whatever their name.
    assert ops["QuantizeLinear"] == len(quantized) and ops.get("DequantizeLinear", 0) == len(dequantized), ops


def check_reasons(program: eq.QuantizedProgram) -> None:
    """Something stays in float, and each such op says why."""
    origins = program.float_origins()
    assert origins and all(origin.reason and origin.aten for origin in origins)
    assert len(program.integer_ops()) >= 5


@pytest.mark.parametrize("name", BLOCKS)
def test_each_op_of_a_torchscript_plan_is_integer_or_says_why_not(name: str) -> None:
    block = BLOCKS[name]
    rows = eq.plan(block.factory().eval(), inputs(block, 0), "torchscript").rows()
    assert {row.runs for row in rows} <= {"INT8", "float"} and any(row.runs == "INT8" for row in rows)
    assert all(row.reason for row in rows if row.runs == "float")
