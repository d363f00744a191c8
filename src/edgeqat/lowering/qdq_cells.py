"""An ONNX file in QDQ form, cut into cells: what stands between the integers that go in and those that come out.

A cell ends with a QuantizeLinear, or with an output of the graph, and begins where other cells end. What it means is
what ONNX says of its nodes: dequantize, compute in real numbers, quantize. A runtime replaces it by one integer
kernel, or leaves it in float.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeqat.errors import InputError
from edgeqat.lowering.onnx_writer import import_onnx

if TYPE_CHECKING:
    import onnx

__all__ = ["Cell", "QdqGraph", "meant"]

QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"


def meant(output: str) -> str:
    """The name of a cell's end in the model that says what it means."""
    return f"{output}#meant"


@dataclass(frozen=True)
class Cell:
    """One cell.

    Attributes:
        output: The integer tensor that its QuantizeLinear makes, or the float output of the graph.
        real: The float tensor that is quantized; None where the cell ends in float.
        inputs: Where it begins: outputs of other cells, and inputs of the graph.
        constants: Names of the initializers that its nodes read.
        ops: Types of its nodes, those that dequantize and quantize left out.
        scale: Of its QuantizeLinear, where it is one number; else None.
        zero_point: Of its QuantizeLinear.
        low: Smallest integer of its type.
        high: Largest integer of its type.
    """

    output: str
    real: str | None
    inputs: tuple[str, ...]
    constants: frozenset[str]
    ops: tuple[str, ...]
    scale: float | None = None
    zero_point: int = 0
    low: int = 0
    high: int = 0


class QdqGraph:
    """A file in QDQ form.

    Args:
        path: An .onnx file.

    Raises:
        InputError: It cannot be read, or quantizes no value.
    """

    def __init__(self, path: Path) -> None:
        self._onnx = import_onnx()
        self.FLOAT = self._onnx.TensorProto.FLOAT
        try:
            self.model: onnx.ModelProto = self._onnx.load(str(path))
            self._onnx.checker.check_model(self.model)
            inferred = self._onnx.shape_inference.infer_shapes(self.model)
        except Exception as error:
            # protobuf, the checker and the file system each have exceptions of their own; all mean the same here.
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(f"{path} cannot be read as ONNX ({reason}); wanted an .onnx file in QDQ form") from error
        graph = self.model.graph
        self._types = {info.name: info for info in (*inferred.graph.value_info, *graph.input, *graph.output)}
        self._constants = {tensor.name: tensor for tensor in graph.initializer}
        self._makers = {name: node for node in graph.node for name in node.output}
        self.inputs = [info for info in graph.input if info.name not in self._constants]
        self.outputs = [info.name for info in graph.output]
        self._fixed = self._find_fixed()
        self.quantized = [n.output[0] for n in graph.node if n.op_type == QUANTIZE and n.output[0] not in self._fixed]
        if not self.quantized:
            raise InputError(f"{path} quantizes no value: it has no QuantizeLinear; wanted an .onnx file in QDQ form")
        floats = [name for name in self.outputs if name not in self.quantized and name in self._makers]
        self.ends = (*self.quantized, *floats)

    def _find_fixed(self) -> set[str]:
        """Tensors that do not depend on the inputs."""
        fixed = set(self._constants) | {""}
        for node in self.model.graph.node:
            if fixed.issuperset(node.input):
                fixed.update(node.output)
        return fixed

    def cells(self) -> list[Cell]:
        """Every cell, in the order of the file; outputs of the graph that are float last."""
        return [self._cell(name) for name in self.ends]

    def _cell(self, output: str) -> Cell:
        nodes, begins = self._slice(output)
        ops = tuple(node.op_type for node in nodes if node.op_type not in (QUANTIZE, DEQUANTIZE))
        constants = frozenset(name for node in nodes for name in node.input if name in self._constants)
        maker = self._makers[output]
        if maker.op_type != QUANTIZE:
            return Cell(output, None, begins, constants, ops)
        scale, zero_point = self._number(maker.input[1]), self._zero_point(maker)
        low, high = self._bounds(output)
        return Cell(output, maker.input[0], begins, constants, ops, scale, zero_point, low, high)

    def _slice(self, output: str) -> tuple[list[Any], tuple[str, ...]]:
        """(nodes in the file's order, what they begin with)."""
        ends, seen, begins = {*self.quantized, *(info.name for info in self.inputs)}, set[str](), list[str]()
        stack = list(self._makers[output].input)
        needed = {id(self._makers[output])}
        while stack:
            name = stack.pop()
            if name in seen or not name:
                continue
            seen.add(name)
            if name in ends:
                begins.append(name)
            elif name in self._makers:
                needed.add(id(self._makers[name]))
                stack += self._makers[name].input
        return [node for node in self.model.graph.node if id(node) in needed], tuple(sorted(begins))

    def meaning(self, cells: Sequence[Cell]) -> bytes:
        """A model of the cells, each on its own: their beginnings are its inputs; its outputs are their ends, by
        `meant`, and their real numbers."""
        helper = self._onnx.helper
        begins = sorted({name for cell in cells for name in cell.inputs})
        needed = {id(node): node for cell in cells for node in self._slice(cell.output)[0]}
        nodes = []
        for node in self.model.graph.node:
            if id(node) in needed:
                copy = type(node)()
                copy.CopyFrom(node)
                # What one cell makes is an input of the next, so the two need different names.
                ends = [meant(name) if name in self.ends else name for name in node.output]
                copy.output[:] = ends
                nodes.append(copy)
        used = {name for node in nodes for name in node.input}
        reals = {cell.real for cell in cells if cell.real is not None} - set(begins)
        outputs = [*(meant(cell.output) for cell in cells), *sorted(reals)]
        graph = helper.make_graph(
            nodes,
            "meaning",
            [self._info(name) for name in begins],
            [helper.make_empty_tensor_value_info(name) for name in outputs],
            [tensor for name, tensor in self._constants.items() if name in used],
        )
        model = helper.make_model(graph, opset_imports=self.model.opset_import, ir_version=self.model.ir_version)
        model.functions.extend(self.model.functions)
        return bytes(model.SerializeToString())

    def tapped(self) -> bytes:
        """The file's bytes with every quantized value an output too."""
        model = type(self.model)()
        model.CopyFrom(self.model)
        known = set(self.outputs)
        model.graph.output.extend(
            self._onnx.helper.make_empty_tensor_value_info(name) for name in self.quantized if name not in known
        )
        return bytes(model.SerializeToString())

    def input_ranges(self) -> Mapping[str, tuple[float, float]]:
        """The real range of the grid of every input of the graph that is quantized at once."""
        found: dict[str, tuple[float, float]] = {}
        names = {info.name for info in self.inputs}
        for output in self.quantized:
            maker = self._makers[output]
            if maker.input[0] in names and self._number(maker.input[1]) is not None:
                scale, zero_point = self._number(maker.input[1]), self._zero_point(maker)
                low, high = self._bounds(output)
                assert scale is not None
                found[maker.input[0]] = ((low - zero_point) * scale, (high - zero_point) * scale)
        return found

    def _info(self, name: str) -> Any:
        """The type of a tensor, its sizes left open."""
        if name in self._types:
            kind = self._types[name].type.tensor_type.elem_type
        else:
            kind = self._constants[self._makers[name].input[2]].data_type
        return self._onnx.helper.make_tensor_value_info(name, kind, None)

    def _number(self, name: str) -> float | None:
        tensor = self._constants.get(name)
        if tensor is None:
            return None
        array = self._onnx.numpy_helper.to_array(tensor)
        return float(array.reshape(-1)[0]) if array.size == 1 else None

    def _zero_point(self, maker: Any) -> int:
        value = self._number(maker.input[2]) if len(maker.input) > 2 and maker.input[2] else 0.0
        return 0 if value is None else int(value)

    def _bounds(self, output: str) -> tuple[int, int]:
        """The integers of the type of a quantized tensor."""
        name = self._onnx.TensorProto.DataType.Name(self._info(output).type.tensor_type.elem_type).lower()
        bits = int(name.removeprefix("u").removeprefix("int"))
        return (0, 2**bits - 1) if name.startswith("u") else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
