"""Float islands in ONNX: torch's own exporter writes them, and their nodes are inlined into the program's graph."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from edgeqat.errors import EdgeqatError, MissingRuntimeError
from edgeqat.graph.opaque import OPAQUE
from edgeqat.program import BATCH_DIM, Kind, Op, QuantizedProgram

__all__ = ["Islands"]


@dataclass(frozen=True)
class _Part:
    """What one island is within an exported graph.

    Attributes:
        nodes: In order; no other part has the same messages.
        initializers: What the nodes read.
        inputs: The graph's names of the island's inputs.
        outputs: The graph's names of its outputs.
        prefix: What the names of its own parameters begin with.
    """

    nodes: list[Any]
    initializers: list[Any]
    inputs: list[str]
    outputs: list[str]
    prefix: str


class Islands:
    """The float ops of a program in ONNX.

    They are exported together when the first one is asked for: a call of the exporter takes seconds, however little
    it exports, and a network may have a float op in every block.
    """

    def __init__(self, program: QuantizedProgram, opset: int) -> None:
        self._program, self._opset = program, opset
        self._parts: dict[str, _Part] | None = None

    def inline(self, op: Op, prefix: str) -> tuple[list[Any], list[Any]]:
        """Nodes and initializers of a float op, reading op.inputs and making op.outputs; other names get `prefix`.

        Raises:
            MissingRuntimeError: onnx or onnxscript is not installed.
            EdgeqatError: torch's exporter cannot write an island.
        """
        if self._parts is None:
            self._parts = _export_all(self._program, self._opset)
        part = self._parts[op.name]
        names = dict(zip(part.inputs, op.inputs, strict=True))
        nodes = list(part.nodes)
        for made, name in zip(part.outputs, op.outputs, strict=True):
            if made in names:  # an output that is an input, or the same tensor twice
                import onnx

                nodes.append(onnx.helper.make_node("Identity", [made], [name]))
                names[name] = name
            else:
                names[made] = name

        def rename(name: str) -> str:
            return names.get(name, f"{prefix}.{name.removeprefix(part.prefix)}") if name else name

        for node in nodes:
            _rename_node(node, rename)
        for tensor in part.initializers:
            tensor.name = rename(tensor.name)
            tensor.ClearField("doc_string")
            tensor.ClearField("metadata_props")
        return nodes, part.initializers


class _Together(nn.Module):
    """Runs float islands one beside the other: takes all their inputs and returns all their outputs."""

    def __init__(self, bodies: Sequence[GraphModule], inputs: Sequence[int]) -> None:
        super().__init__()
        self.inputs = tuple(inputs)
        for i, body in enumerate(bodies):
            self.add_module(str(i), body)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        outputs: list[Tensor] = []
        start = 0
        for body, n in zip(self.children(), self.inputs, strict=True):
            outputs += body(*tensors[start : start + n])
            start += n
        return tuple(outputs)


def _export_all(program: QuantizedProgram, opset: int) -> dict[str, _Part]:
    """By the name of the op."""
    ops = [op for op in program.ops if op.kind is Kind.FLOAT]
    try:
        return _export(program, ops, opset)
    except EdgeqatError:
        if len(ops) == 1:
            raise
        # One at a time, so that the error names the ops of the island that cannot be written, and of no other.
        return {name: part for op in ops for name, part in _export(program, [op], opset).items()}


def _export(program: QuantizedProgram, ops: Sequence[Op], opset: int) -> dict[str, _Part]:
    bodies = [op.body for op in ops if op.body is not None]
    assert len(bodies) == len(ops)
    examples, shapes = [], []
    for i, (op, body) in enumerate(zip(ops, bodies, strict=True)):
        placeholders = [node for node in body.graph.nodes if node.op == "placeholder"]
        batches = _Batches(i)
        for node, name in zip(placeholders, op.inputs, strict=True):
            shape = program.values[name].shape
            captured = node.meta["val"].shape
            pairs = list(zip(shape, captured, strict=True))
            sizes = [batches.example(c) if s == BATCH_DIM else _example_size(c) for s, c in pairs]
            examples.append(torch.zeros(sizes, dtype=node.meta["val"].dtype))
            dynamic = torch.export.Dim.DYNAMIC
            open_sizes = ((d, s, c) for d, (s, c) in enumerate(pairs) if isinstance(s, str))
            shapes.append({d: batches.dim(c) if s == BATCH_DIM else dynamic for d, s, c in open_sizes})
    together = _Together(bodies, [len(op.inputs) for op in ops]).eval()
    graph = _written(together, tuple(examples), tuple(shapes), ops, opset).graph
    inputs, outputs = ([info.name for info in infos] for infos in (graph.input, graph.output))
    makers = {name: i for i, node in enumerate(graph.node) for name in node.output}
    stored = {tensor.name: i for i, tensor in enumerate(graph.initializer)}
    parts: dict[str, _Part] = {}
    taken: set[str] = set()
    for i, op in enumerate(ops):
        own_inputs, inputs = inputs[: len(op.inputs)], inputs[len(op.inputs) :]
        own_outputs, outputs = outputs[: len(op.outputs)], outputs[len(op.outputs) :]
        reads = _upstream(graph, makers, own_outputs)
        found = [graph.node[k] for k in sorted({makers[name] for name in reads & makers.keys()})]
        nodes = [_own(node, node.output, taken) for node in found]
        tensors = [graph.initializer[k] for k in sorted(stored[name] for name in reads & stored.keys())]
        initializers = [_own(tensor, [tensor.name], taken) for tensor in tensors]
        parts[op.name] = _Part(nodes, initializers, own_inputs, own_outputs, f"{i}.")
    return parts


class _Batches:
    """The sizes of one island's inputs that depend on the batch: the batch itself, and multiples such as windows.

    A batch of its own for each island: no island's sizes are computed from another's input.
    """

    def __init__(self, island: int) -> None:
        self._batch = torch.export.Dim(f"{BATCH_DIM}{island}", min=1)

    def example(self, size: Any) -> int:
        """What stands for a size in the example: that of a batch of 2."""
        multiple = _multiple_of_batch(size)
        return 2 if multiple is None else 2 * multiple

    def dim(self, size: Any) -> Any:
        """What torch.export is told of a size."""
        multiple = _multiple_of_batch(size)
        if multiple is None:
            return torch.export.Dim.DYNAMIC
        return self._batch if multiple == 1 else multiple * self._batch


def _multiple_of_batch(size: Any) -> int | None:
    """k where a symbolic size is k times the batch, None where it is another formula."""
    expression = size.node.expr
    symbols = list(expression.free_symbols)
    if len(symbols) != 1:
        return None
    multiple = expression / symbols[0]
    return int(multiple) if multiple.is_Integer else None


def _example_size(size: Any) -> int:
    """The size that the model was captured with."""
    return size if isinstance(size, int) else int(size.node.hint)


def _upstream(graph: Any, makers: Mapping[str, int], outputs: Sequence[str]) -> set[str]:
    """Every name that the named values are computed from, and they themselves."""
    found, wanted = set(outputs), list(outputs)
    while wanted:
        maker = makers.get(wanted.pop())
        new = set() if maker is None else _reads(graph.node[maker]) - found
        found |= new
        wanted += new
    return found


def _own(message: Any, names: Sequence[str], taken: set[str]) -> Any:
    """A node or initializer to rename; a copy where another island took it first."""
    if taken.isdisjoint(names):
        taken.update(names)
        return message
    copied = type(message)()
    copied.CopyFrom(message)
    return copied


def _reads(node: Any) -> set[str]:
    """Every name that a node reads, those that its subgraphs read from outside among them."""
    found = set(node.input)
    for attribute in node.attribute:
        if attribute.HasField("g"):
            found |= {info.name for info in attribute.g.output}
            for inner in attribute.g.node:
                found |= _reads(inner)
    return found


def _written(
    module: nn.Module, examples: tuple[Tensor, ...], shapes: tuple[Any, ...], ops: Sequence[Op], opset: int
) -> Any:
    """The ONNX model that torch's exporter makes of a module that takes its inputs by position."""
    try:
        import onnx.inliner
        import onnxscript  # noqa: F401  torch.onnx needs it; asked for here, where the error can say so
    except ImportError as error:
        raise MissingRuntimeError("onnxruntime", "onnxruntime", str(error)) from error
    # The exporter prints its progress, warns of its own internals and shows the graph that it gave up on; none of it
    # tells the user anything.
    printed = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        warnings.simplefilter("ignore")
        disabled = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            # An island over parameters alone has no inputs, and then there is nothing to name.
            dynamic = {"tensors": shapes} if examples else None
            exported = torch.export.export(module, examples, dynamic_shapes=dynamic)
            written = torch.onnx.export(exported, dynamo=True, opset_version=opset, optimize=True, verbose=False)
        except Exception as error:
            # Whatever the exporter stumbles over, the user needs to know which ops, not where in torch.
            reason = str(error).splitlines()[0]
            opaque = ", ".join(o.describe() for op in ops for o in op.origins if o.aten == OPAQUE)
            if opaque:
                raise EdgeqatError(
                    f"ONNX cannot hold the opaque {opaque}: torch.onnx says {reason}; lower to torchscript, or "
                    "rewrite it so that torch.export takes it"
                ) from error
            kinds = ", ".join(sorted({origin.aten for op in ops for origin in op.origins}))
            raise EdgeqatError(f"torch.onnx cannot export the float ops {kinds}: {reason}") from error
        finally:
            logging.disable(disabled)
    assert written is not None
    return onnx.inliner.inline_local_functions(written.model_proto)


def _rename_node(node: Any, rename: Any) -> None:
    node.ClearField("name")
    node.ClearField("doc_string")
    node.ClearField("metadata_props")
    node.input[:] = [rename(name) for name in node.input]
    node.output[:] = [rename(name) for name in node.output]
    for attribute in node.attribute:
        attribute.ClearField("doc_string")
        if attribute.HasField("g"):  # If and Loop bodies read outer names too
            for inner in attribute.g.node:
                _rename_node(inner, rename)
            for tensor in attribute.g.initializer:
                tensor.name = rename(tensor.name)
            for info in [*attribute.g.input, *attribute.g.output]:
                info.name = rename(info.name)
