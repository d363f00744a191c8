"""Cross-layer equalization: of two layers in a row, the first makes less of a channel and the second more of it.

With nothing but a ReLU between them, act(s x) = s act(x) for s > 0, so that

    W1' = W1 / s, b1' = b1 / s over output channels        W2' = W2 * s over input channels

leave the network what it was. With r1 and r2 the largest |w| of a channel in both layers, s = sqrt(r1 / r2) makes them
equal, so that no channel wastes the range that it shares with others. A layer can be the second of one pair and the
first of the next, so the pairs are gone through again and again until nothing moves; ranges alone are needed for that.

The factors are then rounded to powers of two, with which float arithmetic commutes: the float network computes what it
did to the bit, at the price of ranges that are equal to within a factor of 2.

Source: Nagel et al. 2019 (arXiv:1906.04721), section 4.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from edgeqat import affine
from edgeqat.arguments import check_made
from edgeqat.errors import PhaseError
from edgeqat.op_attrs import ConvAttrs, ConvTransposeAttrs, LinearAttrs
from edgeqat.program import WEIGHTED, Kind, Op, QuantizedProgram
from edgeqat.ptq.walk import check_folded, shared_parameters
from edgeqat.simulate.model import SimulatedModel
from edgeqat.simulate.pixel_quantizer import PixelQuantizer

__all__ = ["EqualizedPair", "Equalization", "equalize"]

ROUNDS = 100
"""How often all pairs are gone through at most; chains of layers settle long before."""

SETTLED = 0.01
"""The largest binary logarithm of a factor in a round once nothing moves."""

LARGEST = 8
"""The largest binary logarithm of a factor: a channel with hardly any weights would else get a bias, and so a range of
values, beyond all others'."""

HOMOGENEOUS = frozenset({Kind.CLAMP, Kind.MAX_POOL, Kind.AVERAGE_POOL})
"""Kinds that keep channels apart and that a positive factor passes through; a clamp is a ReLU on its own."""


@dataclass(frozen=True)
class EqualizedPair:
    """Two layers, by op, and how far the ranges of their channels lay apart before and after.

    Attributes:
        first: The layer whose output channels were scaled.
        second: The one whose input channels were scaled back.
        spread: The largest range of the second's input channels over the smallest that is not 0.
        spread_after: The same afterwards.
    """

    first: str
    second: str
    spread: float
    spread_after: float


@dataclass(frozen=True)
class Equalization:
    """What `equalize` did: to each pair, and by op the reason why a layer is not the first of one."""

    pairs: tuple[EqualizedPair, ...]
    skipped: dict[str, str]


def equalize(sim: SimulatedModel) -> Equalization:
    """Moves ranges between neighbouring layers so that their channels become alike; in place, before calibration.

    In float the simulation computes the same bits as before. It does most for weights with one scale for all channels;
    with scales per channel it still evens out the input channels of each layer. A ReLU6 clamps where it did however
    its input is scaled, so nothing is moved through one.

    Args:
        sim: In phase "float", with batch norms folded.

    Raises:
        InputError: `sim` was not made by `prepare`.
        PhaseError: The simulation has grids already, which would not fit any more.
        PlanError: A batch norm is live.
    """
    check_made(sim, SimulatedModel)
    found = [q for q in sim.activation_quantizers().values() if not isinstance(q, PixelQuantizer)]
    if sim.phase != "float" or any(quantizer.calibrated for quantizer in found):
        raise PhaseError("equalize wants a simulation without grids, and this one was calibrated; prepare it again")
    check_folded(sim, "equalize")
    pairs, skipped = _find_pairs(sim)
    with torch.no_grad():
        before = [_spread(sim, second) for _, second in pairs]
        for (first, second), exponents in zip(pairs, _settle(sim, pairs), strict=True):
            factors = torch.exp2(exponents)
            own = sim.parameters_of[first.name]
            _scale_outputs(sim.get_parameter(own.weight), first, 1 / factors)
            if own.bias is not None:
                bias = sim.get_parameter(own.bias)
                bias.copy_(bias / factors)
            _scale_inputs(_weight(sim, second), second, factors)
        after = [_spread(sim, second) for _, second in pairs]
    spreads = zip(pairs, before, after, strict=True)
    return Equalization(tuple(EqualizedPair(a.name, b.name, x, y) for (a, b), x, y in spreads), skipped)


def _find_pairs(sim: SimulatedModel) -> tuple[list[tuple[Op, Op]], dict[str, str]]:
    """The pairs in execution order, and why other layers are no first of one."""
    program = sim.plan.program
    readers: dict[str, list[Op]] = {}
    for op in program.ops:
        for name in op.inputs:
            readers.setdefault(name, []).append(op)
    shared = shared_parameters(sim)
    pairs: list[tuple[Op, Op]] = []
    skipped: dict[str, str] = {}
    for op in (op for op in program.ops if op.kind in WEIGHTED):
        second = _second(program, readers, op)
        reason = second if isinstance(second, str) else _why_not(sim, shared, op, second)
        if reason or isinstance(second, str):
            skipped[op.name] = reason
        else:
            pairs.append((op, second))
    return pairs, skipped


def _second(program: QuantizedProgram, readers: Mapping[str, list[Op]], first: Op) -> Op | str:
    """The layer that reads what `first` makes and nothing else does, or why there is none."""
    if isinstance(first.attrs, (ConvAttrs, ConvTransposeAttrs, LinearAttrs)) and first.attrs.activation == "relu6":
        return "a ReLU6 is behind it, which clamps at 6 whatever the scale"
    name = first.name
    channel = len(program.values[name].shape) - 1 if first.kind is Kind.LINEAR else 1
    while True:
        found = readers.get(name, [])
        if name in program.outputs or not found:
            return "its result is the model's"
        if len(found) > 1:
            return f"{len(found)} ops read {name}: {', '.join(op.name for op in found)}"
        op = found[0]
        dims = len(program.values[name].shape)
        if op.kind in WEIGHTED:
            wanted = dims - 1 if op.kind is Kind.LINEAR else 1
            return op if wanted == channel else f"{op.name} does not read its channels as channels"
        if not _keeps_channels(program, op, channel):
            return f"{op.name} ({op.kind.value}) is behind it"
        name = op.name


def _keeps_channels(program: QuantizedProgram, op: Op, channel: int) -> bool:
    """Whether a positive factor for each channel passes through an op."""
    if op.kind in HOMOGENEOUS:
        return op.kind is Kind.CLAMP or channel == 1
    before, after = (program.values[name].shape for name in (op.inputs[0], op.name))
    flattens = channel == 1 and len(after) == 2 and before[:2] == after and all(size == 1 for size in before[2:])
    return op.kind is Kind.VIEW and flattens


def _why_not(sim: SimulatedModel, shared: Mapping[str, int], first: Op, second: Op) -> str:
    """Why the parameters of two layers cannot be scaled, "" if they can."""
    for op in (first, second):
        own = sim.parameters_of[op.name]
        for name in (own.weight, own.bias if op is first else None):
            if name is not None and name in shared:
                return f"{shared[name]} layers have {name}"
    return ""


def _weight(sim: SimulatedModel, op: Op) -> Tensor:
    return sim.get_parameter(sim.parameters_of[op.name].weight).detach()


def _spread(sim: SimulatedModel, op: Op) -> float:
    """The largest range of a layer's input channels over the smallest that is not 0."""
    ranges = _input_ranges(_weight(sim, op), op)
    ranges = ranges[ranges > 0]
    return float(ranges.max() / ranges.min()) if len(ranges) else 1.0


def _settle(sim: SimulatedModel, pairs: list[tuple[Op, Op]]) -> list[Tensor]:
    """The binary logarithm of each pair's factors, whole numbers in float64 [C]."""
    # All that ranges need to know of a weight is its largest magnitude over each window.
    weights = {op: _weight(sim, op).double().abs() for pair in pairs for op in pair}
    tables = {op: weight.reshape(*weight.shape[:2], -1).amax(2) for op, weight in weights.items()}
    logarithms = [torch.zeros_like(_output_ranges(tables[first], first)) for first, _ in pairs]
    for _ in range(ROUNDS):
        moved = 0.0
        for (first, second), logarithm in zip(pairs, logarithms, strict=True):
            r1, r2 = _output_ranges(tables[first], first), _input_ranges(tables[second], second)
            step = torch.where((r1 > 0) & (r2 > 0), 0.5 * torch.log2(r1 / r2), 0.0)
            logarithm += step
            _scale_outputs(tables[first], first, torch.exp2(-step))
            _scale_inputs(tables[second], second, torch.exp2(step))
            moved = max(moved, float(step.abs().max()))
        if moved < SETTLED:
            break
    return [logarithm.round().clamp(-LARGEST, LARGEST) for logarithm in logarithms]


def _grouped(weight: Tensor, op: Op) -> Tensor:
    """A weight as [groups, outputs, inputs, the rest]."""
    if isinstance(op.attrs, ConvTransposeAttrs):
        return weight.transpose(0, 1).reshape(1, weight.shape[1], weight.shape[0], -1)
    groups = op.attrs.groups if isinstance(op.attrs, ConvAttrs) else 1
    return weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)


def _output_ranges(weight: Tensor, op: Op) -> Tensor:
    """The largest |w| of each output channel, [C_out]."""
    return _grouped(weight, op).abs().amax((2, 3)).flatten()


def _input_ranges(weight: Tensor, op: Op) -> Tensor:
    """The largest |w| of each input channel, [C_in]."""
    return _grouped(weight, op).abs().amax((1, 3)).flatten()


def _scale_outputs(weight: Tensor, op: Op, factors: Tensor) -> None:
    """Multiplies each output channel of a weight, in place."""
    axis = 1 if isinstance(op.attrs, ConvTransposeAttrs) else 0
    weight.mul_(affine.broadcast(factors.to(weight.dtype), axis, weight.dim()))


def _scale_inputs(weight: Tensor, op: Op, factors: Tensor) -> None:
    """Multiplies each input channel of a weight, in place."""
    if isinstance(op.attrs, ConvTransposeAttrs):
        weight.mul_(affine.broadcast(factors.to(weight.dtype), 0, weight.dim()))
        return
    grouped = _grouped(weight, op)
    factors = factors.to(weight.dtype).reshape(grouped.shape[0], 1, grouped.shape[2], 1)
    weight.copy_((grouped * factors).reshape(weight.shape))
