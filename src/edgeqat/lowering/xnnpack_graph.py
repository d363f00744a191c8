"""Writing down one XNNPACK graph: tensors, nodes and constants, in the form that ExecuTorch's delegate reads.

Sizes are those of one sample with the batch in front; XNNPACK infers them anew for every batch. A tensor may lie in
another order of dimensions than the program's: `Tensor.order` names, for each dimension in memory, the program's.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from edgeqat.program import Grid

__all__ = ["ABSENT", "SHIFT", "Graph", "Located", "clamped", "same_memory"]

SHIFT = 128
"""An activation is stored as its integer less this."""

STORED_MAX = 255
"""Where kernels clamp by themselves."""

ABSENT = 2**32 - 1
"""Stands for an input that a node does not have, and for a tensor that is not external."""

ALIGNMENT = 16
NO_DEBUG_HANDLE = 65535
NAMED = 2**64 - 1
"""Stands for the offset of a constant that is found by its name."""

EXTERNAL_INPUT, EXTERNAL_OUTPUT = 1, 2
FLOAT, INT8, CHANNELWISE_INT8, CHANNELWISE_INT32 = 1, 3, 6, 7
"""Datatypes of the schema."""

Order = tuple[int, ...]


@dataclass(frozen=True)
class Located:
    """A tensor of the graph.

    Attributes:
        id: Its number.
        shape: Sizes in the program's order of dimensions; the batch, which is first, is 1.
        order: The program's dimension that each dimension in memory is.
        grid: None for float32.
    """

    id: int
    shape: tuple[int, ...]
    order: Order
    grid: Grid | None

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sizes in the order of memory."""
        return tuple(self.shape[dim] for dim in self.order)


def same_memory(shape: Sequence[int], first: Order, second: Order) -> bool:
    """Whether two orders put the elements into the same sequence: they differ in dimensions of size 1 alone."""
    moved = [[dim for dim in order if dim == 0 or shape[dim] != 1] for order in (first, second)]
    return moved[0] == moved[1]


class Graph:
    """An XNNPACK graph that grows node by node."""

    def __init__(self) -> None:
        from executorch.backends.xnnpack.serialization import xnnpack_graph_schema as schema
        from executorch.exir._serialize._named_data_store import NamedDataStore

        self.schema = schema
        self._values: list[Any] = []
        self._nodes: list[Any] = []
        self._constants: list[Any] = [schema.ConstantDataOffset(0, 0)]
        self._data = NamedDataStore()
        self._externals = 0
        self._inputs: list[int] = []
        self._outputs: list[int] = []

    def input(self, given: Located) -> Located:
        """The next input, which lies as `given` does."""
        found = self._tensor(given.shape, given.order, given.grid, EXTERNAL_INPUT)
        self._inputs.append(found.id)
        return found

    def tensor(self, shape: tuple[int, ...], order: Order, grid: Grid | None) -> Located:
        """What a node makes."""
        return self._tensor(shape, order, grid, 0)

    def constant(self, data: torch.Tensor, grid: Grid, order: Order) -> Located:
        """Integers that are an operand: uint8, in the program's order; they come to lie in `order`."""
        stored = (data.to(torch.int16) - SHIFT).to(torch.int8).permute(order)
        located = Located(len(self._values), tuple(data.shape), order, grid)
        self._add(located, INT8, self._store(stored), ABSENT, 0)
        return located

    def weights(self, data: torch.Tensor, scale: torch.Tensor, channel_dim: int, datatype: int) -> int:
        """A weight or a bias with a scale for each channel, as it lies in memory; its number."""
        buffer = self._store(data)
        quant = self.schema.PerChannelQuant(
            scale=[],
            channel_dim=channel_dim,
            scale_buffer_idx=self._store(scale.to(torch.float32)),
            num_scales=scale.numel(),
        )
        number = len(self._values)
        tensor = self._value(number, tuple(data.shape), datatype, buffer, ABSENT, 0)
        self._values.append(self.schema.XValue(self.schema.XNNQuantizedTensorValue(tensor, quant)))
        return number

    def node(self, node: Any, bounds: tuple[float, float] | None = None) -> None:
        """Appends a node; `bounds` are the least and the largest real value that it may give."""
        limits = None if bounds is None else self.schema.OutputMinMax(*("inf" if b == math.inf else b for b in bounds))
        self._nodes.append(self.schema.XNode(node, NO_DEBUG_HANDLE, limits))

    def output(self, tensor: Located) -> None:
        """Makes a tensor, which a node gives, the next output."""
        quantized = self._values[tensor.id].xvalue_union
        value = quantized if tensor.grid is None else quantized.tensor_value
        changed = dataclasses.replace(value, external_id=self._externals, flags=EXTERNAL_OUTPUT)
        self._externals += 1
        if tensor.grid is not None:
            changed = dataclasses.replace(quantized, tensor_value=changed)
        self._values[tensor.id] = self.schema.XValue(changed)
        self._outputs.append(tensor.id)

    def kinds(self) -> list[str]:
        """The kind of every node, in order, such as "Conv2d"."""
        return [type(node.xnode_union).__name__.removeprefix("XNN") for node in self._nodes]

    def serialized(self) -> tuple[bytes, Any]:
        """The graph as the delegate reads it, and its constants."""
        from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import serialize_xnnpack_binary

        graph = self.schema.XNNGraph(
            version="0",
            xnodes=self._nodes,
            xvalues=self._values,
            num_externs=self._externals,
            input_ids=self._inputs,
            output_ids=self._outputs,
            constant_data=self._constants,
        )
        return bytes(serialize_xnnpack_binary(graph, bytearray())), self._data.get_named_data_store_output()

    def _tensor(self, shape: tuple[int, ...], order: Order, grid: Grid | None, flags: int) -> Located:
        found = Located(len(self._values), shape, order, grid)
        external = ABSENT
        if flags:
            external = self._externals
            self._externals += 1
        self._add(found, FLOAT if grid is None else INT8, 0, external, flags)
        return found

    def _add(self, tensor: Located, datatype: int, buffer: int, external: int, flags: int) -> None:
        value = self._value(tensor.id, tensor.sizes, datatype, buffer, external, flags)
        if tensor.grid is not None:
            scale, zero_point = tensor.grid.per_tensor()
            quant = self.schema.PerTensorQuant(scale, zero_point - SHIFT)
            value = self.schema.XNNQuantizedTensorValue(value, quant)
        self._values.append(self.schema.XValue(value))

    def _value(
        self, number: int, sizes: tuple[int, ...], datatype: int, buffer: int, external: int, flags: int
    ) -> Any:
        return self.schema.XNNTensorValue(
            datatype=self.schema.XNNDatatype(datatype),
            num_dims=len(sizes),
            dims=list(sizes),
            constant_buffer_idx=buffer,
            external_id=external,
            flags=flags,
            id_out=number,
        )

    def _store(self, data: torch.Tensor) -> int:
        raw = np.ascontiguousarray(data.numpy()).tobytes()
        key = hashlib.sha256(raw).hexdigest()
        self._data.add_named_data(key, raw, ALIGNMENT)
        self._constants.append(self.schema.ConstantDataOffset(NAMED, len(raw), key))
        return len(self._constants) - 1


def clamped(graph: Graph, x: Located) -> Located:
    """What a node gave, clamped where its grid ends; XNNPACK makes that a part of the node before, where it can."""
    if x.grid is None or x.grid.qmax == STORED_MAX:
        return x
    scale, zero_point = x.grid.per_tensor()
    y = graph.tensor(x.shape, x.order, x.grid)
    ends = ((x.grid.qmin - zero_point) * scale, (x.grid.qmax - zero_point) * scale)
    graph.node(graph.schema.XNNClamp(x.id, y.id, 0), ends)
    return y
