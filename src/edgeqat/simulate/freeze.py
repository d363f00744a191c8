"""Freezing: a simulation's grids, weights and biases become the integers of a QuantizedProgram.

`convert` hands it out, and exact mode runs it, so that what is evaluated is what is shipped.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from edgeqat import affine
from edgeqat.arguments import MADE_BY, named
from edgeqat.errors import InputError, PhaseError, PlanError
from edgeqat.graph.fold_bn import folded_bias, gain_of
from edgeqat.lookup import table_of
from edgeqat.op_attrs import ConstantAttrs, LookupAttrs
from edgeqat.planning import Plan
from edgeqat.program import Const, Grid, Kind, Op, QuantizedProgram, Value
from edgeqat.program_hash import hash_grids
from edgeqat.simulate.fake_quant import ActivationQuantizer
from edgeqat.simulate.op_parameters import OpParameters
from edgeqat.simulate.operand_quantizer import OperandQuantizer
from edgeqat.simulate.parameter_quantizers import WeightQuantizer
from edgeqat.simulate.phases import CONVERTED

__all__ = ["Simulation", "convert", "freeze"]


class Simulation(Protocol):
    """What freezing needs of a SimulatedModel."""

    plan: Plan
    parameters_of: Mapping[str, OpParameters]

    def activation_quantizers(self) -> dict[str, ActivationQuantizer]:
        """By the name of the first value on their grid."""
        ...

    def weight_quantizers(self) -> dict[str, WeightQuantizer]:
        """By the name of the parameter."""
        ...

    def get_parameter(self, target: str) -> nn.Parameter:
        """A parameter by its dotted name."""
        ...

    def get_submodule(self, target: str) -> nn.Module:
        """A module by its dotted name."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Every parameter and buffer."""
        ...

    def set_phase(self, phase: str) -> None:
        """Switches the phase."""
        ...


def convert(sim: Simulation) -> QuantizedProgram:
    """The quantized program of a calibrated simulation, on the CPU, with the hash of its grids.

    The simulation computes the same afterwards, in phase "converted": it can be trained on and converted again, but
    not calibrated again.

    Raises:
        InputError: `sim` was not made by `prepare`.
        PhaseError: A grid is missing: the simulation was not calibrated.
        PlanError: A weight is not finite, or a bias does not fit int32 at its scale.
    """
    if not hasattr(sim, "plan"):
        raise InputError(f"found {named(sim)}, wanted what {MADE_BY['SimulatedModel']} returns")
    program = freeze(sim)
    if sim.activation_quantizers():  # else nothing is quantized, whatever the phase
        sim.set_phase(CONVERTED)
    return program


def freeze(sim: Simulation) -> QuantizedProgram:
    """The quantized program of a calibrated simulation, on the CPU; the simulation is left as it was.

    Raises:
        PhaseError: A grid is missing: the simulation was not calibrated.
        PlanError: A weight is not finite, or a bias does not fit int32 at its scale; or it was moved to a type other
            than float32.
    """
    plan = sim.plan.program
    _check_float32(sim)
    grids: dict[int, Grid] = {}
    for name, quantizer in sim.activation_quantizers().items():
        if not quantizer.calibrated:
            raise PhaseError(f"{name} has no grid yet; call edgeqat.calibrate(sim, batches) before convert")
        if isinstance(quantizer, OperandQuantizer) and name in plan.consts:  # training moved it since it was read
            quantizer.follow(_operand_tensor(sim, plan.consts[name]))
        empty = plan.grid_of(name)
        scale, zero_point = (t.detach().cpu().clone() for t in quantizer.grid())
        grids[id(empty)] = replace(empty, qmax=quantizer.highest, scale=scale, zero_point=zero_point)
    values = {
        name: value if value.grid is None else replace(value, grid=grids[id(value.grid)])
        for name, value in plan.values.items()
    }
    quantizers = sim.weight_quantizers()
    consts: dict[str, Const] = {}
    biases: dict[str, Tensor] = {}
    for op in plan.ops:
        if op.kind is Kind.LOOKUP:
            consts[op.name] = _table(plan.consts[op.name], op, values)
        elif isinstance(op.attrs, ConstantAttrs):
            consts[op.name] = _operand(sim, plan.consts[op.name], values[op.name])
        if op.weight is None:
            continue
        parameters = sim.parameters_of[op.name]
        input_grid = values[op.inputs[0]].grid
        assert input_grid is not None
        input_scale, _ = input_grid.filled()
        bias = None if parameters.bias is None else sim.get_parameter(parameters.bias).detach().cpu()
        if parameters.norm is None:
            consts[op.weight] = _const(sim, plan.consts[op.weight], quantizers[op.weight])
        else:
            raw = _const(sim, plan.consts[op.weight], quantizers[op.weight])
            norm = sim.get_submodule(parameters.norm)
            assert isinstance(norm, _BatchNorm)
            consts[op.weight], bias = _normed(raw, norm, bias, input_scale)
        if bias is not None:
            biases[op.name] = _bias(op, bias, input_scale, consts[op.weight])
    ops = tuple(_filled(sim, op, biases) for op in plan.ops)
    grid_hash = hash_grids(ops, values, consts, plan.inputs)
    return QuantizedProgram(ops, values, consts, plan.inputs, plan.outputs, plan.signature, plan.plan_hash, grid_hash)


def _check_float32(sim: Simulation) -> None:
    for quantizer in (*sim.activation_quantizers().values(), *sim.weight_quantizers().values()):
        for tensor in (*quantizer.parameters(), *quantizer.buffers()):
            if tensor.is_floating_point() and tensor.dtype != torch.float32:
                found = str(tensor.dtype).removeprefix("torch.")
                raise PlanError(
                    f"the grid of {quantizer.name} is {found}, wanted float32: a simulation is trained in float32, or "
                    f"under torch.autocast; calibrate and train it again without moving it to {found}"
                )


def _const(sim: Simulation, const: Const, quantizer: WeightQuantizer) -> Const:
    parameter = sim.get_parameter(const.source)
    weight = parameter.detach().cpu()
    if not bool(torch.isfinite(weight).all()):
        raise PlanError(f"{const.source} holds NaN or infinite weights; training diverged, lower the learning rate")
    scale = quantizer.scale_of(parameter).cpu()
    zero = torch.zeros_like(scale, dtype=torch.int32)
    data = affine.quantize(weight, scale, zero, const.grid.qmin, const.grid.qmax, const.grid.axis)
    return replace(const, data=data.to(torch.int8), grid=replace(const.grid, scale=scale, zero_point=zero))


def _table(const: Const, op: Op, values: Mapping[str, Value]) -> Const:
    """The table of a function between the grids that calibration and training found."""
    source, result = values[op.inputs[0]].grid, values[op.name].grid
    assert isinstance(op.attrs, LookupAttrs) and source is not None and result is not None
    return replace(const, data=table_of(op.attrs, source, result), grid=result)


def _operand_tensor(sim: Simulation, const: Const) -> Tensor:
    """The parameter or buffer that a constant is made of."""
    holder, _, leaf = const.source.rpartition(".")
    tensor: Tensor = getattr(sim.get_submodule(holder), leaf)
    return tensor.detach()


def _operand(sim: Simulation, const: Const, value: Value) -> Const:
    """A parameter or buffer that is added or multiplied with, as integers."""
    tensor = _operand_tensor(sim, const)
    if not bool(torch.isfinite(tensor).all()):
        raise PlanError(f"{const.source} holds NaN or infinite values; training diverged, lower the learning rate")
    assert value.grid is not None
    scale, zero_point = value.grid.filled()
    data = affine.quantize(tensor.detach().cpu(), scale, zero_point, value.grid.qmin, value.grid.qmax)
    return replace(const, data=data.to(torch.uint8), grid=value.grid)


def _normed(raw: Const, norm: _BatchNorm, bias: Tensor | None, input_scale: Tensor) -> tuple[Const, Tensor]:
    """Weight and bias of a conv or linear with a live batch norm folded into the scale of each channel.

    The integers are those of the raw weight, negated where gamma is negative; only a channel whose gain is (almost)
    zero gets others, on the smallest scale at which its bias still fits int32.
    """
    assert raw.data is not None
    raw_scale, zero = raw.grid.filled()
    gain = gain_of(norm)
    folded = folded_bias(None if bias is None else bias.to(gain.device), norm).cpu().to(torch.float32)
    gain = gain.cpu()
    floor = affine.scale_for_bias(folded, input_scale).clamp_min(affine.SCALE_FLOOR)
    scale = torch.maximum((raw_scale.double() * gain.abs()).to(torch.float32), floor)
    steps = gain * raw_scale.double() / scale.double()
    data = torch.round(raw.data.double() * affine.broadcast(steps, raw.grid.axis, raw.data.dim()))
    return replace(raw, data=data.to(torch.int8), grid=replace(raw.grid, scale=scale, zero_point=zero)), folded


def _bias(op: Op, bias: Tensor, input_scale: Tensor, const: Const) -> Tensor:
    """The int32 bias of an op."""
    weight_scale, _ = const.grid.filled()
    integers = affine.quantize_bias(bias, input_scale, weight_scale)
    if not bool((integers.abs() < 2**31).all()):
        worst = float(bias.abs().max())
        raise PlanError(
            f"{op.name}: its bias (up to {worst:.3g}) does not fit int32 at its scale; call "
            "sim.reserve_bias_ranges(), or calibrate again"
        )
    return integers.to(torch.int32)


def _filled(sim: Simulation, op: Op, biases: Mapping[str, Tensor]) -> Op:
    if op.body is not None:
        return replace(op, body=_body(sim, op.body))
    return replace(op, bias=biases[op.name]) if op.name in biases else op


def _body(sim: Simulation, body: fx.GraphModule) -> fx.GraphModule:
    own = copy.deepcopy(body)
    state: dict[str, Tensor] = sim.state_dict()
    # Constants made in forward are no part of the state: the island has them already.
    trained = {name: state[name].detach().cpu() for name in own.state_dict() if name in state}
    own.load_state_dict(trained, strict=False)
    return own.eval()
