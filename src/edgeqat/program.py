"""The quantized program: the one op list that everything else interprets.

A plan is this program with empty grids; simulation trains its grids and weights; `convert` fills it in; the
reference interpreter runs it; each lowering spells it for a runtime; `verify` joins a runtime's tensors to its
value names. QDQ nodes are one spelling of it, never a source of numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

import torch
from torch import Tensor
from torch.fx import GraphModule

from edgeqat.errors import InputError
from edgeqat.op_attrs import Attrs, NoAttrs
from edgeqat.signature import Signature

__all__ = [
    "BATCH_DIM",
    "PASSTHROUGH",
    "WEIGHTED",
    "Const",
    "Grid",
    "Kind",
    "Op",
    "Origin",
    "QuantizedProgram",
    "Value",
]

BATCH_DIM = "batch"
"""How a shape names its dynamic first dimension."""


class Kind(str, Enum):
    """Every kind of op a program holds. All but QUANTIZE, DEQUANTIZE, FLOAT and CONSTANT map integers to integers."""

    QUANTIZE = "quantize"
    DEQUANTIZE = "dequantize"
    CONV = "conv"
    LINEAR = "linear"
    CONV_TRANSPOSE = "conv_transpose"
    ADD = "add"
    MUL = "mul"
    MATMUL = "matmul"
    CONCAT = "concat"
    LOOKUP = "lookup"
    CONSTANT = "constant"
    AVERAGE_POOL = "average_pool"
    MAX_POOL = "max_pool"
    VIEW = "view"
    PERMUTE = "permute"
    PAD = "pad"
    SLICE = "slice"
    CLAMP = "clamp"
    EXPAND = "expand"
    RESIZE = "resize"
    FLOAT = "float"


WEIGHTED = frozenset({Kind.CONV, Kind.CONV_TRANSPOSE, Kind.LINEAR})
"""Kinds with a weight and perhaps a bias of their own."""

PASSTHROUGH = frozenset(
    {Kind.MAX_POOL, Kind.VIEW, Kind.PERMUTE, Kind.PAD, Kind.SLICE, Kind.CLAMP, Kind.EXPAND, Kind.RESIZE}
)
"""Kinds that move integers without computing new ones, so that their output has their input's grid."""


@dataclass(frozen=True, eq=False)
class Grid:
    """The representable points scale * (q - zero_point) for integers qmin <= q <= qmax.

    Canonical integers: activations 0..2**bits - 1, weights +-(2**(bits-1) - 1) with zero_point 0. uint8 or int8
    storage is the lowering's shift by 128. Two values that must share a grid hold the same Grid object.

    Attributes:
        qmin: Smallest integer.
        qmax: Largest integer.
        axis: Channel dimension of a per-channel grid, else None.
        scale: float32, 0-d or [C]; None in a plan. Used at this very value everywhere.
        zero_point: int32, same shape as `scale`; None in a plan. ReLU means zero_point == qmin.
    """

    qmin: int
    qmax: int
    axis: int | None = None
    scale: Tensor | None = None
    zero_point: Tensor | None = None

    def filled(self) -> tuple[Tensor, Tensor]:
        """Returns (scale, zero_point) of a grid that is not a plan's.

        Raises:
            InputError: The grid is still empty.
        """
        if self.scale is None or self.zero_point is None:
            raise InputError("found an empty grid, wanted a calibrated one: convert the plan's simulation first")
        return self.scale, self.zero_point

    def per_tensor(self) -> tuple[float, int]:
        """Returns (scale, zero_point) of a per-tensor grid as Python numbers; the scale is exact."""
        scale, zero_point = self.filled()
        return float(scale), int(zero_point)

    def describe(self) -> str:
        """A short name such as `u8`, `s8 per-channel` or `u8 scale 0.0235 zero 114`."""
        bits = (self.qmax - self.qmin).bit_length()
        text = f"{'u' if self.qmin == 0 else 's'}{bits}"
        if self.axis is not None:
            return f"{text} per-channel"
        if self.scale is not None and self.zero_point is not None:
            text += f" scale {float(self.scale):.4g} zero {int(self.zero_point)}"
        return text


@dataclass(frozen=True)
class Value:
    """A tensor that flows through the program.

    Attributes:
        name: Unique name, after the module that makes it.
        shape: Sizes, "batch" for the dynamic first dimension.
        grid: None means float.
        why: Why it is float, or why it has this grid.
        dtype: What it holds where it has no grid; float32 but for a user's own integer or half inputs and outputs.
            uint8 for an input of pixels.
    """

    name: str
    shape: tuple[int | str, ...]
    grid: Grid | None
    why: str
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Const:
    """The integers of one parameter, buffer or table.

    Attributes:
        source: Dotted name of the parameter or buffer; of a table, the name of its op.
        data: Weights: int8, the parameter's shape. Operands of additions and products: uint8, its shape. Tables:
            uint8, an entry for every integer of the input's grid. None in a plan.
        grid: Its grid; of a table, the grid of the values in it.
    """

    source: str
    data: Tensor | None
    grid: Grid


@dataclass(frozen=True)
class Origin:
    """Where an op comes from in the user's model, and what became of it.

    Attributes:
        module: Dotted module name, "" for the root.
        type: The module's class name.
        aten: The ATen op.
        line: Source line as "file.py:12", "" where unknown.
        reason: Why it is float; "" for an op that runs in integers.
        group: The block of a fusion pattern that it belongs to, as `se (squeeze-excite)`; "" for none.
    """

    module: str
    type: str
    aten: str
    line: str
    reason: str = ""
    group: str = ""

    def describe(self) -> str:
        """`layer1.0.conv1 (Conv2d)`, or the op's own name where no module holds it."""
        return f"{self.module or '<model>'} ({self.type})"


@dataclass(frozen=True, eq=False)
class Op:
    """One step of a program.

    Attributes:
        kind: What it does.
        inputs: Names of the values it reads.
        outputs: Names of the values it makes; one, except for kind FLOAT.
        attrs: Typed per kind.
        weight: Name of its Const, for CONV and LINEAR.
        bias: int32 [C_out] at scale s_x * s_w, per call site; None in a plan or where there is none.
        body: The exported float island of kind FLOAT, in eval mode: takes `inputs`, returns a tuple.
        origins: What it was in the user's model.
    """

    kind: Kind
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attrs: Attrs = field(default_factory=NoAttrs)
    weight: str | None = None
    bias: Tensor | None = None
    body: GraphModule | None = None
    origins: tuple[Origin, ...] = ()

    @property
    def name(self) -> str:
        """The op's name: that of its first output."""
        return self.outputs[0]


@dataclass(frozen=True, eq=False)
class QuantizedProgram:
    """Ops in execution order over named values, with their integer weights and grids.

    Attributes:
        ops: In an order in which every value is made before it is read.
        values: By name.
        consts: By name of the parameter.
        inputs: Names of the input values. They are given as they are, one with a grid as its integers.
        outputs: Names of the float output values, in the order of the flattened output.
        signature: How the user's model is called.
        plan_hash: Equal for two programs of the same plan; origins are left out of it.
        grid_hash: Equal for two programs whose grids are the same, to the bit; "" in a plan.
    """

    ops: tuple[Op, ...]
    values: Mapping[str, Value]
    consts: Mapping[str, Const]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    signature: Signature
    plan_hash: str
    grid_hash: str = ""

    def __repr__(self) -> str:
        """One line: its ops and weights would fill a book."""
        floats = len(self.float_origins())
        counted = f"{len(self.integer_ops())} integer ops, {floats} float op{'' if floats == 1 else 's'}"
        inputs = ", ".join(f"{name} {list(self.values[name].shape)}" for name in self.inputs)
        return f"QuantizedProgram({inputs} -> {', '.join(self.outputs)}; {counted}; plan {self.plan_hash[:12]})"

    def grid_of(self, name: str) -> Grid:
        """The grid of a value that has one.

        Raises:
            InputError: The value is float.
        """
        grid = self.values[name].grid
        if grid is None:
            raise InputError(f"value {name!r} is float, wanted one with a grid")
        return grid

    def tapped(self) -> list[str]:
        """The values with a grid that depend on the inputs, in the order they are made: what can be looked at."""
        unchanging: set[str] = set()
        found: list[str] = []
        for op in self.ops:
            if unchanging.issuperset(op.inputs):  # a parameter, or what is made of parameters alone
                unchanging.update(op.outputs)
            else:
                found += [name for name in op.outputs if self.values[name].grid is not None]
        return found

    def integer_ops(self) -> list[Op]:
        """The ops that compute integers from integers (or float logits from integers)."""
        return [op for op in self.ops if op.kind not in (Kind.QUANTIZE, Kind.DEQUANTIZE, Kind.FLOAT)]

    def float_origins(self) -> list[Origin]:
        """What stays in float, each with its reason."""
        return [origin for op in self.ops if op.kind is Kind.FLOAT for origin in op.origins]
