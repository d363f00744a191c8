"""Programs of one op, built by hand, so that a runtime's arithmetic can be held against the reference op by op."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from edgeqat.lookup import fixed_grid
from edgeqat.op_attrs import Attrs, ConvAttrs, NoAttrs
from edgeqat.program import Const, Grid, Kind, Op, QuantizedProgram, Value
from edgeqat.signature import Signature


def grid(scale: float, zero_point: int, qmax: int = 255) -> Grid:
    """A per-tensor activation grid."""
    return Grid(0, qmax, None, torch.tensor(scale, dtype=torch.float32), torch.tensor(zero_point, dtype=torch.int32))


def one_op(
    kind: Kind,
    attrs: Attrs,
    shapes: Sequence[tuple[int, ...]],
    input_grids: Sequence[Grid],
    output_shape: tuple[int, ...],
    output_grid: Grid | None,
    weight: Tensor | None = None,
    weight_scale: Tensor | None = None,
    bias: Tensor | None = None,
) -> QuantizedProgram:
    """Quantize each input, do one op, dequantize. Shapes leave the batch out."""
    ops, values, consts = [], {}, {}
    inputs = [f"x{i}" for i in range(len(shapes))]
    for name, shape, item in zip(inputs, shapes, input_grids, strict=True):
        values[name] = Value(name, ("batch", *shape), None, "input")
        values[f"{name}.q"] = Value(f"{name}.q", ("batch", *shape), item, "given")
        ops.append(Op(Kind.QUANTIZE, (name,), (f"{name}.q",), NoAttrs()))
    if weight is not None:
        assert weight_scale is not None
        axis = 0 if weight_scale.dim() else None
        zero = torch.zeros_like(weight_scale, dtype=torch.int32)
        consts["w"] = Const("w", weight.to(torch.int8), Grid(-127, 127, axis, weight_scale, zero))
    values["y"] = Value("y", ("batch", *output_shape), output_grid, "given")
    reads = tuple(f"{name}.q" for name in inputs)
    ops.append(Op(kind, reads, ("y",), attrs, weight=None if weight is None else "w", bias=bias))
    output = "y"
    if output_grid is not None:
        values["y.d"] = Value("y.d", ("batch", *output_shape), None, "output")
        ops.append(Op(Kind.DEQUANTIZE, ("y",), ("y.d",), NoAttrs()))
        output = "y.d"
    _, in_spec = pytree.tree_flatten((tuple(range(len(inputs))), {}))
    _, out_spec = pytree.tree_flatten(0)
    signature = Signature(tuple(inputs), in_spec, out_spec)
    return QuantizedProgram(tuple(ops), values, consts, tuple(inputs), (output,), signature, "test")


def own_grid(function: str) -> Grid:
    """The grid that the range of a function fixes, for 8 bits."""
    found = fixed_grid(function, 8)
    assert found is not None
    return Grid(0, 255, None, *found)


def on_grid(item: Grid, integers: Tensor) -> Tensor:
    """Real values of integers of a grid."""
    scale, zero_point = item.filled()
    return (integers.float() - zero_point) * scale


CONV = ConvAttrs(stride=(1, 1), padding=((1, 1), (1, 1)), dilation=(1, 1), groups=1)

TABLE_ARGUMENTS = {
    "leaky_relu": (0.1,),
    "elu": (1.0, 1.0507, 1.0),
    "clamp": (-1.5, 2.0),
    "scale": (-0.3,),
    "shift": (1.7,),
    "divide": (6.0,),
    "subtract_from": (1.0,),
}
"""Of the functions of `edgeqat.lookup` that take some."""
