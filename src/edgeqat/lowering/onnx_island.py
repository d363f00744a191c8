"""Float islands in ONNX: torch's own exporter writes them, and their nodes are inlined into the program's graph."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from edgeqat.errors import EdgeqatError, MissingRuntimeError
from edgeqat.program import BATCH_DIM, Op, QuantizedProgram

__all__ = ["inline_island"]


def inline_island(program: QuantizedProgram, op: Op, prefix: str, opset: int) -> tuple[list[Any], list[Any]]:
    """Nodes and initializers of a float op, reading op.inputs and making op.outputs; other names get `prefix`.

    Raises:
        MissingRuntimeError: onnx or onnxscript is not installed.
        EdgeqatError: torch's exporter cannot write the island.
    """
    assert op.body is not None
    graph = _export(program, op, op.body, opset).graph
    names = {info.name: name for info, name in zip(graph.input, op.inputs, strict=True)}
    outputs = [info.name for info in graph.output]
    nodes = list(graph.node)
    for made, name in zip(outputs, op.outputs, strict=True):
        if made in names:  # an output that is an input, or the same tensor twice
            import onnx

            nodes.append(onnx.helper.make_node("Identity", [made], [name]))
            names[name] = name
        else:
            names[made] = name

    def rename(name: str) -> str:
        return names.get(name, f"{prefix}.{name}") if name else name

    for node in nodes:
        _rename_node(node, rename)
    for tensor in graph.initializer:
        tensor.name = rename(tensor.name)
        tensor.ClearField("doc_string")
        tensor.ClearField("metadata_props")
    return nodes, list(graph.initializer)


def _export(program: QuantizedProgram, op: Op, body: GraphModule, opset: int) -> Any:
    examples = tuple(_example(program, body, i, name) for i, name in enumerate(op.inputs))
    batch = torch.export.Dim(BATCH_DIM, min=1)
    shapes = tuple(
        {d: batch for d, size in enumerate(program.values[name].shape) if size == BATCH_DIM} for name in op.inputs
    )
    placeholders = [node.name for node in body.graph.nodes if node.op == "placeholder"]
    try:
        import onnx.inliner
        import onnxscript  # noqa: F401  torch.onnx needs it; asked for here, where the error can say so
    except ImportError as error:
        raise MissingRuntimeError("onnxruntime", "onnxruntime", str(error)) from error
    # The exporter prints its progress and warns of its own internals; neither tells the user anything.
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            exported = torch.export.export(body, examples, dynamic_shapes=dict(zip(placeholders, shapes, strict=True)))
            written = torch.onnx.export(exported, dynamo=True, opset_version=opset, optimize=True, verbose=False)
        except Exception as error:
            # Whatever the exporter stumbles over, the user needs to know which ops, not where in torch.
            ops = ", ".join(sorted({o.aten for o in op.origins}))
            raise EdgeqatError(
                f"torch.onnx cannot export the float ops {ops}: {str(error).splitlines()[0]}"
            ) from error
        finally:
            logging.disable(logging.NOTSET)
    assert written is not None
    return onnx.inliner.inline_local_functions(written.model_proto)


def _example(program: QuantizedProgram, body: GraphModule, index: int, name: str) -> Tensor:
    node = [n for n in body.graph.nodes if n.op == "placeholder"][index]
    shape = [2 if size == BATCH_DIM else int(size) for size in program.values[name].shape]
    return torch.zeros(shape, dtype=node.meta["val"].dtype)


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
