"""Every batch norm of the table, folded or refused, from prepare to the integers of ONNX Runtime."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import edgeqat as eq
from batch_norm_cases import CASES, EXPECTED_WARNING, BatchNormCase
from edgeqat import affine
from edgeqat.program import Kind, Op
from edgeqat.replay.script import replay
from helpers import EXACT_ARITHMETIC

pytestmark = pytest.mark.filterwarnings(EXPECTED_WARNING)

FLOAT32 = 1e-5
"""How far float32 may be from float64 here, as a share of the largest output: fan-ins up to 216, two layers deep.

An eps of 1e-5 in the place of 1e-3 moves outputs by some percent, since variances go down to 0.005.
"""


@dataclass(frozen=True)
class Shipped:
    """A case that went the whole way."""

    case: BatchNormCase
    model: nn.Module
    plan: eq.Plan
    float_output: Tensor
    program: eq.QuantizedProgram
    artifact: eq.Artifact


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def shipped(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Shipped:
    case = request.param
    torch.manual_seed(0)
    model, x = case.factory(), case.example()
    sim = eq.prepare(model, x)
    with torch.no_grad():
        float_output = sim(x)
    program = eq.convert(eq.calibrate(sim, [x]))
    artifact = eq.lower(program, "onnxruntime", tmp_path_factory.mktemp("case") / "artifact")
    return Shipped(case, model, sim.plan, float_output, program, artifact)


class Definition(nn.Module):
    """A batch norm written down from its definition, in float64."""

    def __init__(self, norm: _BatchNorm) -> None:
        super().__init__()
        self.norm, self.eps = copy.deepcopy(norm).double(), norm.eps

    def forward(self, x: Tensor) -> Tensor:
        norm, shape = self.norm, (1, -1, *[1] * (x.dim() - 2))
        mean, var = norm.running_mean, norm.running_var
        if mean is None or var is None:
            others = [d for d in range(x.dim()) if d != 1]
            mean = x.mean(others)
            var = ((x - mean.reshape(shape)) ** 2).mean(others)
        y = (x - mean.reshape(shape)) / torch.sqrt(var.reshape(shape) + self.eps)
        return y * norm.weight.reshape(shape) + norm.bias.reshape(shape) if norm.affine else y


def oracle(model: nn.Module, x: Tensor) -> Tensor:
    """The model's output in float64, without torch's batch norm."""
    own = copy.deepcopy(model).double()
    for name, module in list(own.named_modules()):
        if isinstance(module, _BatchNorm):
            parent = own.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], Definition(model.get_submodule(name)))
    with torch.no_grad():
        return own(x.double())


def norms_of(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, _BatchNorm)]


def test_what_is_folded_and_why_the_rest_is_not(shipped: Shipped) -> None:
    case, plan = shipped.case, shipped.plan
    if case.folds:
        assert set(plan.folded) == set(norms_of(shipped.model))
        assert [row for row in plan.rows() if row.runs == "float"] == []
    else:
        assert plan.folded == ()
        reasons = [row.reason for row in plan.rows() if row.kind == "batch_norm"]
        assert reasons and all(case.refusal in reason for reason in reasons), reasons


def test_before_quantization_it_computes_what_the_definition_says(shipped: Shipped) -> None:
    expected = oracle(shipped.model, shipped.case.example())
    assert float((shipped.float_output - expected).abs().max()) <= FLOAT32 * float(expected.abs().max())


@EXACT_ARITHMETIC
def test_every_integer_that_is_owed_is_the_references(shipped: Shipped) -> None:
    case, program, artifact = shipped.case, shipped.program, shipped.artifact
    batches = [case.example(), case.example(1, seed=1), case.example(7, seed=2)]
    exact = {row["value"] for row in artifact.manifest["checks"] if row["exact"]}
    for batch in batches:
        _, values = eq.reference(program, batch, taps=True)
        _, found = artifact.session().run_with_taps([batch])
        wrong = {name: float((found[name] != values[name]).double().mean()) for name in values}
        assert {name: wrong[name] for name in exact if wrong[name]} == {}
        # Two libraries may differ in the last bit of a float op. That moves what is quantized from it once in some
        # ten thousand elements, and a conv behind it once for each weight: a float op that is another one, or was
        # quantized after all, moves every tenth.
        assert max(wrong.values()) <= 0.01
    parity = eq.verify(artifact, program, batches)
    if case.folds:
        assert exact == {value.name for value in program.values.values() if value.grid is not None}
        assert (parity.bit_identical, parity.max_error_steps, parity.first_difference) == (1.0, 0.0, None)
    else:
        assert exact
    assert replay(artifact.folder).passed


def test_the_file_stays_near_the_definition(shipped: Shipped) -> None:
    """8 bits cost some percent of the largest output; a lost eps, gamma, group or padding costs far more."""
    x = shipped.case.example()
    expected = oracle(shipped.model, x)
    assert float((shipped.artifact.run(x) - expected).abs().max()) <= 0.08 * float(expected.abs().max())


def test_shipped_weights_are_those_of_the_definition(shipped: Shipped) -> None:
    program, folded = shipped.program, []
    for op in program.ops:
        norms = [origin.module for origin in op.origins[1:] if origin.aten == "aten.batch_norm"]
        if op.weight is None or not norms:
            continue
        folded += norms
        norm = shipped.model.get_submodule(norms[0])
        weight = shipped.model.get_parameter(op.weight).detach().double()
        gain = 1 / torch.sqrt(norm.running_var.double() + norm.eps)
        shift = -norm.running_mean.double()
        bias_name = op.weight.removesuffix("weight") + "bias"
        if bias_name in dict(shipped.model.named_parameters()):
            shift = shift + shipped.model.get_parameter(bias_name).detach().double()
        if norm.affine:
            gain = gain * norm.weight.detach().double()
        bias = shift * gain + (norm.bias.detach().double() if norm.affine else 0.0)
        axis = 1 if op.kind is Kind.CONV_TRANSPOSE else 0
        check_integers(program, op, weight * affine.broadcast(gain, axis, weight.dim()), bias)
    assert sorted(folded) == sorted(shipped.plan.folded)


def check_integers(program: eq.QuantizedProgram, op: Op, weight: Tensor, bias: Tensor) -> None:
    const = program.consts[str(op.weight)]
    assert const.data is not None and op.bias is not None
    scale = const.grid.filled()[0].double()
    data = const.data
    if op.kind is Kind.CONV_TRANSPOSE:  # [C_in, C_out, ...]
        weight, data = weight.transpose(0, 1), data.transpose(0, 1)
    largest = weight.abs().flatten(1).amax(1) / 127
    # Rounded to float32 twice, as a weight and as a scale.
    assert bool((scale >= largest * (1 - 2.0**-22)).all())
    # Only a channel that is all but dead has a larger scale: its bias must fit int32.
    alive = largest > 1e-6
    assert bool((scale[alive] <= largest[alive] * (1 + 2.0**-22)).all())
    steps = weight / scale.reshape(-1, *[1] * (weight.dim() - 1))
    assert float((data - steps).abs().max()) <= 0.5 + 127 * 2.0**-22
    # Half a step, and half a unit in the last place of the float32 bias that is trained.
    steps = bias / (program.grid_of(op.inputs[0]).filled()[0].double() * scale)
    assert bool(((op.bias - steps).abs() <= 0.5 + steps.abs() * 2.0**-23).all())
