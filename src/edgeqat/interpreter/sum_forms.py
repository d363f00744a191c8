"""How OpenVINO computes each addition of a program: which operand it rescales, and what it fuses with.

Its CPU plugin brings one operand, the scaled one, to the scale of the other, adds, and quantizes. Where the last
convolution before an addition can take the addition in, it does; the quantization in between then clamps and no
longer rounds, so that its integers never exist. The rules follow the plugin's passes: AddTransformation,
SnippetsMarkSkipped and FuseConvolutionSumAndConvolutionSumActivation.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from torch import Tensor

from edgeqat.program import Kind, Op, QuantizedProgram

__all__ = ["SumForm", "sum_forms"]

QUANTIZED = frozenset(
    {Kind.QUANTIZE, Kind.CONV, Kind.LINEAR, Kind.ADD, Kind.MUL, Kind.MATMUL, Kind.AVERAGE_POOL, Kind.CONCAT}
)
"""Kinds that end with a quantization of their own, which can take a change of scale in."""

PRODUCTS = frozenset({Kind.CONV, Kind.LINEAR, Kind.MATMUL})


@dataclass(frozen=True)
class SumForm:
    """One addition.

    Attributes:
        scaled: Which operand, 0 or 1, is brought to the other's scale.
        requantized: Whether the scaled operand's own quantization does that; else it is computed of its integers.
        apart: Whether a layer of its own brings an operand that is not requantized to the other's scale.
        conv: The convolution that makes the scaled operand, if that is requantized: its integers then never exist,
            and the addition is given its sums.
        merged: Whether that convolution's kernel adds.
        unit: Of a convolution without a bias, 0-d or [C]: what a step of its accumulator stands for, which is then
            divided out of the quantization. None for one with a bias, whose sums are in real units.
    """

    scaled: int
    requantized: bool
    apart: bool
    conv: str | None
    merged: bool
    unit: Tensor | None


def sum_forms(program: QuantizedProgram) -> dict[str, SumForm]:
    """The form of every addition by its name."""
    graph = _Graph(program)
    return {op.name: graph.form(op) for op in program.ops if op.kind is Kind.ADD}


class _Graph:
    """Who makes and who reads each value."""

    def __init__(self, program: QuantizedProgram) -> None:
        self.program = program
        self.makers = {name: op for op in program.ops for name in op.outputs}
        self.readers: dict[str, list[Op]] = {}
        for op in program.ops:
            for name in dict.fromkeys(op.inputs):
                self.readers.setdefault(name, []).append(op)
        self.uses = Counter(name for op in program.ops for name in op.inputs)
        self.uses.update(program.outputs)

    def form(self, op: Op) -> SumForm:
        scaled = self._scaled(op)
        name, other = op.inputs[scaled], op.inputs[1 - scaled]
        maker = self.makers[name]
        requantized = maker.kind in QUANTIZED and self.uses[name] == 1
        conv = name if requantized and maker.kind is Kind.CONV else None
        merged = conv is not None and self._merges(op, maker, other)
        unit = None if conv is None else self._unit(maker)
        return SumForm(scaled, requantized, self._behind_conv(maker), conv, merged, unit)

    def _behind_conv(self, op: Op) -> bool:
        """Whether an op is a max pool behind a convolution alone: the plugin tries to fuse what follows it."""
        if op.kind is not Kind.MAX_POOL:
            return False
        return self.makers[op.inputs[0]].kind is Kind.CONV and self.uses[op.inputs[0]] == 1

    def _merges(self, op: Op, conv: Op, other: str) -> bool:
        """Whether a convolution's kernel adds another value, in whose memory it leaves the sum."""
        if self.program.values[conv.name].shape != self.program.values[other].shape:
            return False
        if self.makers[other].kind is Kind.CONSTANT or other in conv.inputs or other in self.program.outputs:
            return False
        before = self._before(op)
        return all(reader is op or reader.name in before for reader in self.readers[other])

    def _unit(self, op: Op) -> Tensor | None:
        assert op.weight is not None
        if op.bias is not None and bool(op.bias.any()):
            return None
        product: Tensor = (
            self.program.grid_of(op.inputs[0]).filled()[0] * self.program.consts[op.weight].grid.filled()[0]
        )
        return product

    def _scaled(self, op: Op) -> int:
        """The operand that is rescaled: the one whose quantization can do it, if one of them only."""
        makers = [self.makers[name] for name in op.inputs]
        quantized = [maker.kind in QUANTIZED for maker in makers]
        if quantized[0] != quantized[1]:
            return quantized.index(True)
        alone = [self.uses[name] == 1 for name in op.inputs]
        if all(quantized) and alone[0] != alone[1]:
            return alone.index(True)
        products = [all_ and maker.kind in PRODUCTS for maker, all_ in zip(makers, quantized, strict=True)]
        if products[0] == products[1]:
            for i, name in enumerate(op.inputs):
                if all(size == 1 for size in self.program.values[name].shape[2:]):
                    return i
        if alone[0] != alone[1]:
            return alone.index(True)
        return products.index(True) if products[0] != products[1] else 0

    def _before(self, op: Op) -> set[str]:
        """The names of the ops that an op depends on."""
        found: set[str] = set()
        left = list(op.inputs)
        while left:
            maker = self.makers.get(left.pop())
            if maker is not None and maker.name not in found:
                found.add(maker.name)
                left += maker.inputs
        return found
