"""Freezing, or convert: a simulation's grids, weights and biases become the integers of a QuantizedProgram.

Exact mode runs what this one function returns, so that what is evaluated is what is shipped.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn

from edgeqat import affine
from edgeqat.errors import PhaseError, PlanError
from edgeqat.planning import Plan
from edgeqat.program import Const, Grid, Op, QuantizedProgram
from edgeqat.simulate.fake_quant import ActivationQuantizer, WeightQuantizer

__all__ = ["Simulation", "convert"]


class Simulation(Protocol):
    """What freezing needs of a SimulatedModel."""

    plan: Plan
    biases: Mapping[str, str]

    def activation_quantizers(self) -> dict[str, ActivationQuantizer]:
        """By the name of the first value on their grid."""
        ...

    def weight_quantizers(self) -> dict[str, WeightQuantizer]:
        """By the name of the parameter."""
        ...

    def get_parameter(self, target: str) -> nn.Parameter:
        """A parameter by its dotted name."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Every parameter and buffer."""
        ...


def convert(sim: Simulation) -> QuantizedProgram:
    """The quantized program of a calibrated simulation, on the CPU; the simulation is left as it was.

    Raises:
        PhaseError: A grid is missing: the simulation was not calibrated.
        PlanError: A bias does not fit int32 at its scale.
    """
    plan = sim.plan.program
    grids: dict[int, Grid] = {}
    for name, quantizer in sim.activation_quantizers().items():
        if not quantizer.calibrated:
            raise PhaseError(f"{name} has no grid yet; call edgeqat.calibrate(sim, batches) before convert")
        empty = plan.grid_of(name)
        grids[id(empty)] = replace(
            empty,
            scale=quantizer.scale.detach().cpu().clone(),
            zero_point=quantizer.zero_point.detach().cpu().clone(),
        )
    values = {
        name: value if value.grid is None else replace(value, grid=grids[id(value.grid)])
        for name, value in plan.values.items()
    }
    consts = {name: _const(sim, const) for name, const in plan.consts.items()}
    frozen = QuantizedProgram((), values, consts, plan.inputs, plan.outputs, plan.signature, plan.plan_hash)
    ops = tuple(_op(sim, frozen, op) for op in plan.ops)
    return replace(frozen, ops=ops)


def _const(sim: Simulation, const: Const) -> Const:
    weight = sim.get_parameter(const.source).detach().cpu()
    quantizer = sim.weight_quantizers()[const.source]
    if not bool(torch.isfinite(weight).all()):
        raise PlanError(f"{const.source} holds NaN or infinite weights; training diverged, lower the learning rate")
    scale = affine.symmetric_scale(weight, quantizer.qmax, quantizer.axis, quantizer.min_scale.cpu())
    zero = torch.zeros_like(scale, dtype=torch.int32)
    data = affine.quantize(weight, scale, zero, const.grid.qmin, const.grid.qmax, const.grid.axis)
    return replace(const, data=data.to(torch.int8), grid=replace(const.grid, scale=scale, zero_point=zero))


def _op(sim: Simulation, frozen: QuantizedProgram, op: Op) -> Op:
    if op.body is not None:
        return replace(op, body=_body(sim, op.body))
    if op.weight is None or op.name not in sim.biases:
        return op
    bias = sim.get_parameter(sim.biases[op.name]).detach().cpu()
    input_scale, _ = frozen.grid_of(op.inputs[0]).filled()
    weight_scale, _ = frozen.consts[op.weight].grid.filled()
    integers = affine.quantize_bias(bias, input_scale, weight_scale)
    if not bool((integers.abs() < 2**31).all()):
        worst = float(bias.abs().max())
        raise PlanError(f"{op.name}: its bias (up to {worst:.3g}) does not fit int32 at its scale; calibrate again")
    return replace(op, bias=integers.to(torch.int32))


def _body(sim: Simulation, body: fx.GraphModule) -> fx.GraphModule:
    own = copy.deepcopy(body)
    state: dict[str, Tensor] = sim.state_dict()
    # Constants made in forward are no part of the state: the island has them already.
    trained = {name: state[name].detach().cpu() for name in own.state_dict() if name in state}
    own.load_state_dict(trained, strict=False)
    return own.eval()
