"""ONNX spelling of the ops that move integers: they act on the uint8 tensors themselves."""

from __future__ import annotations

import numpy as np

from edgeqat.errors import EdgeqatError
from edgeqat.lowering.onnx_writer import Writer
from edgeqat.op_attrs import (
    ClampAttrs,
    ExpandAttrs,
    MaxPoolAttrs,
    PadAttrs,
    PermuteAttrs,
    ResizeAttrs,
    SliceAttrs,
    ViewAttrs,
)
from edgeqat.program import Op

__all__ = ["INT32_MAX", "cut", "move"]

INT32_MAX = 2**31 - 1
"""Where a slice ends that runs to the end."""


def move(writer: Writer, op: Op) -> None:
    """Adds the nodes of a passthrough op."""
    a, x = op.attrs, op.inputs[0]
    if isinstance(a, MaxPoolAttrs):
        pool = {"kernel_shape": list(a.kernel), "strides": list(a.stride), "dilations": list(a.dilation)}
        edges = {"pads": list(a.padding) * 2, "ceil_mode": int(a.ceil_mode)}
        writer.node("MaxPool", [x], op.name, pool | edges)
    elif isinstance(a, ViewAttrs):
        writer.node("Reshape", [x, writer.integers(*a.shape)], op.name)
    elif isinstance(a, PermuteAttrs):
        writer.node("Transpose", [x], op.name, {"perm": list(a.dims)})
    elif isinstance(a, SliceAttrs):
        stop = INT32_MAX if a.stop is None else a.stop
        bounds = [writer.integers(v) for v in (a.start, stop, a.dim, a.step)]
        writer.node("Slice", [x, *bounds], op.name)
    elif isinstance(a, PadAttrs):
        _pad(writer, x, op.name, a)
    elif isinstance(a, ClampAttrs):
        writer.node("Clip", [x, writer.grid(x)[1]], op.name)
    elif isinstance(a, ExpandAttrs):
        # ONNX broadcasts the two shapes: 1 leaves a dimension as it is.
        writer.node("Expand", [x, writer.integers(*(1 if size == -1 else size for size in a.shape))], op.name)
    elif isinstance(a, ResizeAttrs):
        scales = writer.constant(np.array([1, 1, *a.factors], np.float32))
        nearest = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
        writer.node("Resize", [x, "", scales], op.name, nearest)
    else:
        raise EdgeqatError(f"{op.name}: no ONNX spelling for kind {op.kind.value}")


def cut(writer: Writer, x: str, dim: int, start: int, stop: int) -> str:
    """x[start:stop] along a dimension."""
    return writer.result("s", "Slice", [x, *(writer.integers(v) for v in (start, stop, dim))])


def _pad(writer: Writer, x: str, name: str, a: PadAttrs) -> None:
    if a.mode == "circular":
        _wrap(writer, x, name, a)
        return
    pads = writer.integers(*(side for sides in zip(*a.padding, strict=True) for side in sides))
    if a.mode == "constant":
        writer.node("Pad", [x, pads, writer.grid(x)[1]], name)
    else:
        writer.node("Pad", [x, pads], name, {"mode": {"reflect": "reflect", "replicate": "edge"}[a.mode]})


def _wrap(writer: Writer, x: str, name: str, a: PadAttrs) -> None:
    """Circular padding, a dimension at a time: Pad's own mode for it came with a later opset."""
    dims = [dim for dim, sides in enumerate(a.padding) if any(sides)]
    for dim in dims:
        before, after = a.padding[dim]
        head = [cut(writer, x, dim, -before, INT32_MAX)] if before else []
        tail = [cut(writer, x, dim, 0, after)] if after else []
        result = name if dim == dims[-1] else writer.fresh("p")
        writer.node("Concat", [*head, x, *tail], result, {"axis": dim})
        x = result
