"""What other processors and runtimes may do to a program: read off its numbers, and measured on data.

A program that is exact on this machine may saturate, overflow or be refused elsewhere. `hazards` tells from the
weights, biases and scales alone, and `saturation_cost` runs what x86 without VNNI computes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from edgeqat.affine import BIAS_LIMIT
from edgeqat.arguments import INPUTS, PAIRS, check_batches, check_made, pair_of
from edgeqat.errors import DataError
from edgeqat.interpreter.arithmetic import ARITHMETICS
from edgeqat.interpreter.arithmetic.saturation import saturating_pairs
from edgeqat.interpreter.run import EXACT_FLOAT32, Interpreter, accumulator_bound
from edgeqat.intervals import Estimate
from edgeqat.metrics import MetricLike, evaluate, resolve_metric
from edgeqat.per_sample import same_prediction
from edgeqat.program import WEIGHTED, Op, QuantizedProgram
from edgeqat.xnnpack_ranges import RANGES, scale_ratios

__all__ = ["Hazard", "SaturationCost", "hazards", "saturation_cost"]

VNNI, WITHOUT = "onnxruntime/x86", "onnxruntime/x86-avx2"

INT32_MAX = 2**31 - 1

SMALLEST_NORMAL = 2.0**-126
"""Of float32; what is smaller has fewer digits, and some processors take it for zero."""

XNNPACK_RUNTIMES = ("executorch", "litert")


@dataclass(frozen=True)
class Hazard:
    """One way in which an op may compute something else elsewhere, or not run there.

    Attributes:
        kind: "saturation": pairs of products pass 16 bits. "bias": an integer bias passes half of int32. "overflow":
            sums pass int32 and wrap. "rounding": sums pass 2**24, which float32 rounds before it scales them.
            "range": a runtime refuses the ratio of two scales. "scale": a scale, or a product or ratio of scales,
            is no normal float32.
        where: The processors or kernels that it concerns.
        op: Name of the op.
        found: What was found; of "saturation" the share of output channels in which a pair can.
        limit: What it may be at most, or at least where it is below.
        advice: What to do.
    """

    kind: str
    where: str
    op: str
    found: float
    limit: float
    advice: str

    def describe(self) -> str:
        """One line."""
        return f"{self.op}: {self.kind} ({self.where}), {self.found:.4g} against {self.limit:.4g}; {self.advice}"


def hazards(program: QuantizedProgram, runtime: str | None = None) -> list[Hazard]:
    """The hazards of a converted program, in the order of its ops.

    None of kind "saturation" is proof that no input saturates. The others are bounds over all inputs too.

    Args:
        program: What `convert` returned.
        runtime: A target's name, "onnxruntime" or "torchscript/qnnpack", to leave out what does not concern it.

    Raises:
        InputError: It is no program, or a plan, whose grids are empty.
    """
    check_made(program, QuantizedProgram)
    return [h for op in program.ops for h in _of_op(program, op) if runtime is None or _concerns(h, runtime)]


def _concerns(hazard: Hazard, target: str) -> bool:
    runtime, _, engine = target.partition("/")
    if hazard.kind == "saturation":  # qnnpack's and XNNPACK's kernels add in 32 bits
        return runtime == "onnxruntime" or (runtime == "torchscript" and engine != "qnnpack")
    return hazard.kind != "range" or runtime in XNNPACK_RUNTIMES


def _of_op(program: QuantizedProgram, op: Op) -> Iterator[Hazard]:
    if op.kind in WEIGHTED:
        yield from _of_sums(program, op)
    yield from _of_scales(program, op)


def _of_sums(program: QuantizedProgram, op: Op) -> Iterator[Hazard]:
    """Hazards of the accumulators of a conv or linear."""
    assert op.weight is not None
    weight = program.consts[op.weight].data
    assert weight is not None
    channels = saturating_pairs(weight, op.attrs, program.grid_of(op.inputs[0]).qmax).any(1)
    if bool(channels.any()):
        share, cure = float(channels.double().mean()), "7 bits of weights (bits: 7) cannot saturate"
        yield Hazard("saturation", "x86 without VNNI", op.name, share, 0.0, cure)
    bias = 0 if op.bias is None else int(op.bias.long().abs().max())
    if bias > BIAS_LIMIT:
        way = "call sim.reserve_bias_ranges() before convert, which raises the scale of its weights"
        yield Hazard("bias", "every runtime", op.name, float(bias), float(BIAS_LIMIT), way)
    bound = accumulator_bound(program, op)
    if bound > INT32_MAX:
        way = "give its weights fewer bits, or split the layer"
        yield Hazard("overflow", "every runtime", op.name, float(bound), float(INT32_MAX), way)
    elif bound > EXACT_FLOAT32:
        way = "nothing where the arithmetic is known: the reference rounds such sums as the kernels do"
        yield Hazard("rounding", "float32 requantization", op.name, float(bound), float(EXACT_FLOAT32), way)


def _of_scales(program: QuantizedProgram, op: Op) -> Iterator[Hazard]:
    """Hazards of the scales of an op's values, and of what kernels make of them."""
    ratios = scale_ratios(program, op)
    grids = [program.values[name].grid for name in op.outputs]
    scales = [grid.filled()[0].reshape(-1) for grid in grids if grid is not None]
    if op.weight is not None:
        weight_scale, _ = program.consts[op.weight].grid.filled()
        input_scale, _ = program.grid_of(op.inputs[0]).filled()
        scales += [weight_scale.reshape(-1), (input_scale * weight_scale).reshape(-1)]
    found = torch.cat([*scales, ratios])
    smallest = float(found.min()) if len(found) else 1.0
    if smallest < SMALLEST_NORMAL:
        way = "calibrate with data that reaches this value, or set eps of its weights"
        yield Hazard("scale", "every runtime", op.name, smallest, SMALLEST_NORMAL, way)
    low, high = RANGES.get(op.kind, (0.0, math.inf))
    if bool((ratios < low).any()):
        way = "widen the ranges of its inputs or weights"
        yield Hazard("range", "XNNPACK refuses it", op.name, float(ratios.min()), low, way)
    if bool((ratios >= high).any()):
        way = "widen the range of its result"
        yield Hazard("range", "XNNPACK refuses it", op.name, float(ratios.max()), high, way)


@dataclass(frozen=True)
class SaturationCost:
    """What x86 without VNNI makes of data, against x86 with it; in ONNX Runtime.

    Attributes:
        n: Samples.
        outputs: Share of the output elements that differ.
        agreement: Share of samples with the same largest entry of the first output, [N, C] or per pixel [N, C, H, W];
            None for any other output.
        values: Share of the integers that differ, by the name of the value.
        vnni: The metric with VNNI; None without a metric.
        without: The metric without VNNI.
        drop: What it costs, in the metric's unit, positive where it is worse; with its 95% interval, on pairs.
    """

    n: int
    outputs: float
    agreement: float | None
    values: Mapping[str, float]
    vnni: float | None = None
    without: float | None = None
    drop: Estimate | None = None


def saturation_cost(
    program: QuantizedProgram, batches: Iterable[Any], metric: MetricLike | None = None
) -> SaturationCost:
    """Runs a program in both of ONNX Runtime's arithmetics on x86, and counts what differs.

    Args:
        program: What `convert` returned.
        batches: Inputs; (inputs, targets) with a metric.
        metric: A name, or a callable as `edgeqat.metrics.resolve_metric` takes it.

    Raises:
        DataError: There is no batch, or the metric does not take it.
        InputError: It is no program, or the metric is unknown.
    """
    check_made(program, QuantizedProgram)
    check_batches(batches, INPUTS if metric is None else PAIRS)
    chosen = None if metric is None else resolve_metric(metric)
    both = [Interpreter(program, ARITHMETICS[name]) for name in (VNNI, WITHOUT)]
    tally = _Tally()
    statistics: tuple[list[Tensor], list[Tensor]] = ([], [])
    for batch in batches:
        inputs, targets = (batch, None) if chosen is None else pair_of(batch)
        flat = program.signature.flatten(inputs)
        results = [interpreter.run_with_taps(flat) for interpreter in both]
        tally.add(*results)
        if chosen is not None:
            for kept, (outputs, _) in zip(statistics, results, strict=True):
                scores = evaluate(lambda _, found=outputs: found, [(inputs, targets)], chosen)  # type: ignore[misc]
                kept.append(scores.statistics)
    if not tally.samples:
        raise DataError("found no batches to compare on, wanted at least one")
    if chosen is None:
        return tally.cost()
    vnni, without = (torch.cat(kept) for kept in statistics)
    figures = [chosen.estimate(kept).value for kept in (vnni, without)]
    return replace(tally.cost(), vnni=figures[0], without=figures[1], drop=chosen.drop(vnni, without))


class _Tally:
    """Counts what differs between two runs, batch by batch."""

    def __init__(self) -> None:
        self.samples = 0
        self._outputs: list[Tensor] = []
        self._agreed: list[Tensor] = []
        self._differing: Counter[str] = Counter()
        self._elements: Counter[str] = Counter()

    def add(self, one: tuple[Any, dict[str, Tensor]], other: tuple[Any, dict[str, Tensor]]) -> None:
        """Outputs and values of a batch in both arithmetics."""
        leaves = [pytree.tree_leaves(outputs) for outputs, _ in (one, other)]
        self.samples += len(leaves[0][0])
        self._outputs += [(a != b).flatten() for a, b in zip(*leaves, strict=True)]
        first = leaves[0][0]
        if first.ndim in (2, 4) and first.shape[1] > 1:
            self._agreed.append(same_prediction(first, leaves[1][0]).double())
        for name, integers in one[1].items():
            self._differing[name] += int((integers != other[1][name]).sum())
            self._elements[name] += integers.numel()

    def cost(self) -> SaturationCost:
        return SaturationCost(
            n=self.samples,
            outputs=float(torch.cat(self._outputs).double().mean()),
            agreement=float(torch.cat(self._agreed).mean()) if self._agreed else None,
            values={name: self._differing[name] / count for name, count in self._elements.items()},
        )
