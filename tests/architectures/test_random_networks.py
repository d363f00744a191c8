from __future__ import annotations

import tempfile
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given, note, settings
from torch import Tensor

import edgeqat as eq
from architectures.fixed_networks import FIXED
from architectures.layer_table import FUNCTIONS, LAYERS
from architectures.random_networks import Layer, Network, NetworkSpec, network_specs
from edgeqat.errors import CalibrationWarning, EdgeqatError
from edgeqat.interpreter.arithmetic import ARITHMETICS
from edgeqat.interpreter.run import Interpreter
from edgeqat.program import Kind, Op
from helpers import EXACT_ARITHMETIC
from models import shake

NIGHTLY = settings.get_current_profile_name() == "nightly"
NETWORKS = 300 if NIGHTLY else 40

EXPLAINED_STEPS: Mapping[str, str] = {}
"""Kinds of ops that may differ from the reference by one step, each with the section that says why."""

NOT_SEEN = frozenset({Kind.QUANTIZE, Kind.DEQUANTIZE})
"""Kinds one of whose sides is float: a runtime shows it only where it is an input or output of the model."""

MOST_REFUSED = 0.1
"""Share of networks that may be refused: the table holds what is supported."""


def made(spec: NetworkSpec, folder: Path) -> tuple[eq.QuantizedProgram, eq.Artifact]:
    """The network, calibrated, converted and lowered."""
    torch.manual_seed(spec.seed)
    model = shake(Network(spec), spec.seed).eval()
    batches = [torch.randn(8, *spec.shape), 2 * torch.randn(8, *spec.shape)]
    sim = eq.prepare(model, batches[0])
    if sim.activation_quantizers():
        with warnings.catch_warnings():  # dead channels and the like are nothing unusual in a random network
            warnings.simplefilter("ignore", CalibrationWarning)
            eq.calibrate(sim, batches)
    program = eq.convert(sim)
    return program, eq.lower(program, "onnxruntime", folder)


def differing(program: eq.QuantizedProgram, artifact: eq.Artifact, inputs: list[Tensor]) -> list[str]:
    """The ops that make something else than the reference makes of the runtime's own inputs to them."""
    arithmetic = artifact.arithmetic()
    assert arithmetic is not None
    interpreter = Interpreter(program, ARITHMETICS[arithmetic])
    outputs, inside = artifact.session().run_with_taps(inputs)
    known = dict(zip(program.inputs, inputs, strict=True)) | {n: v.to(torch.float32) for n, v in inside.items()}
    known |= dict(zip(program.outputs, outputs, strict=True))
    wrong = []
    seen = {*program.tapped(), *program.outputs}
    for op in program.ops:
        if not op.inputs or (op.name not in seen and op.kind is Kind.QUANTIZE and set(op.inputs) <= set(known)):
            # A parameter, or what is made of parameters alone: the runtime computes it before it runs.
            known |= dict(zip(op.outputs, interpreter.run_op(op, [known[name] for name in op.inputs]), strict=True))
        elif op.kind is Kind.FLOAT:
            continue
        elif {op.name, *op.inputs} <= set(known):
            (expected,) = interpreter.run_op(op, [known[name] for name in op.inputs])
            wrong += difference(program, op, known[op.name], expected)
        else:
            assert op.kind in NOT_SEEN or program.values[op.name].grid is None, f"{op.name} was not looked at"
    return wrong


def difference(program: eq.QuantizedProgram, op: Op, found: Tensor, expected: Tensor) -> list[str]:
    """One line if a value is not what it should be."""
    if found.shape != expected.shape:
        return [f"{op.name} ({op.kind.value}): shape {tuple(found.shape)}, wanted {tuple(expected.shape)}"]
    allowed = 1.0 if op.kind.value in EXPLAINED_STEPS and program.values[op.name].grid is not None else 0.0
    error = float((found - expected).abs().max()) if found.numel() else 0.0
    if torch.equal(found, expected) or 0 < error <= allowed:
        return []
    return [f"{op.name} ({op.kind.value}, {op.attrs}): off by {error}, {int((found != expected).sum())} elements"]


def check(spec: NetworkSpec, program: eq.QuantizedProgram, artifact: eq.Artifact) -> None:
    """Every op is exact, and so is the whole where it has no float op."""
    inputs = torch.randn(3, *spec.shape) * 1.5
    assert differing(program, artifact, [inputs]) == []
    if not program.float_origins():
        # The outputs are computed without anything looking inside.
        found, expected = artifact.run(inputs), eq.reference(program, inputs)
        leaves = torch.utils._pytree.tree_leaves
        assert all(torch.equal(a, b) for a, b in zip(leaves(found), leaves(expected), strict=True))


@EXACT_ARITHMETIC
@pytest.mark.timeout(3600)  # 300 networks at night
def test_random_networks_are_refused_in_a_line_or_computed_exactly_op_by_op() -> None:
    done: Counter[str] = Counter()

    @settings(max_examples=NETWORKS)
    @given(network_specs())
    def each(spec: NetworkSpec) -> None:
        with tempfile.TemporaryDirectory() as folder:
            try:
                program, artifact = made(spec, Path(folder) / "artifact")
            except EdgeqatError as refusal:
                assert str(refusal).strip() and "\n" not in str(refusal)
                done["refused"] += 1
                return
            note(f"{program.ops}")
            check(spec, program, artifact)
        done["compared"] += 1

    each()
    assert done["refused"] <= MOST_REFUSED * done["compared"], done


@EXACT_ARITHMETIC
@pytest.mark.parametrize("name", FIXED)
def test_every_kind_of_layer_is_taken_and_computed_exactly(name: str, tmp_path: Path) -> None:
    program, artifact = made(FIXED[name], tmp_path / "artifact")
    assert [o.aten for o in program.float_origins() if "has no integer form here" in o.reason] == []
    check(FIXED[name], program, artifact)


def test_the_fixed_networks_hold_every_kind_of_layer() -> None:
    found = [layer for spec in FIXED.values() for layer in within(spec.layers)]
    assert {layer.kind for layer in found} == {*LAYERS, "branches"}
    assert {layer.arguments[0] for layer in found if layer.kind == "function"} == set(FUNCTIONS)


def within(layers: tuple[Layer, ...]) -> list[Layer]:
    """The layers, and those in their branches."""
    inside = [within(branch) for layer in layers for branch in layer.branches]
    return [*layers, *(layer for branch in inside for layer in branch)]
