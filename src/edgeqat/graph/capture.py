"""Capture: an unmodified nn.Module becomes a functional ATen graph that keeps its names and its train()/eval().

torch.export gives one op vocabulary (F.relu, nn.ReLU and torch.relu are one ATen op). Three things it loses are
put back here: in-place variants become their functional twins, batch norm and dropout become modules again (so
that train() and eval() work), and every node knows the module and the source line it comes from.

The graph is exported in eval mode: what is captured is what will be deployed.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import logging
import operator
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from edgeqat.arguments import named
from edgeqat.errors import CaptureError
from edgeqat.graph.capture_error import UNKNOWN_OUTPUT, explain
from edgeqat.graph.example import check_call, check_float32, example_call
from edgeqat.graph.functionalize import BATCH_NORMS, make_functional, source_line
from edgeqat.graph.normalize import normalize
from edgeqat.graph.opaque import OPAQUE, find_opaque, opaque_calls, restore_opaque
from edgeqat.graph.output_types import register_output_dataclasses
from edgeqat.graph.pixels import Pixels, insert_normalisation, normalised_call
from edgeqat.graph.sizes import check_any_size, check_ops_of_open_sizes, dynamic_shapes, name_of, names_of_symbols
from edgeqat.graph.stubs import mark_stubs, strip_stubs
from edgeqat.graph.submodules import owner_of
from edgeqat.program import Origin
from edgeqat.signature import Batch, Leaf, Signature

__all__ = ["CapturedGraph", "capture", "innermost_module"]

aten = torch.ops.aten

DROPOUTS: Mapping[Any, Callable[[float], nn.Module]] = {
    aten.dropout.default: nn.Dropout,
    aten.feature_dropout.default: nn.Dropout2d,
    aten.alpha_dropout.default: nn.AlphaDropout,
    aten.feature_alpha_dropout.default: nn.FeatureAlphaDropout,
}
"""What is put back where a function of torch's drops out; a module is put back as it is."""


@dataclass(frozen=True, eq=False)
class CapturedGraph:
    """A model as a graph of functional ATen ops over named parameters.

    Attributes:
        root: Holds parameters, buffers and the batch-norm and dropout modules under their original names.
        graph: placeholder, get_attr, call_function, call_module and output nodes; the output is a flat tuple.
        signature: How the model is called and what it returns.
        example: The example inputs, flattened, with a batch of at least 2.
        origins: For each compute node, by name.
        outside: Nodes that the user's stubs leave in float, by name, with the reason.
        template: A copy of the user's own module, in the mode it had; it shares its tensors with `root`.
        sizes: What each symbolic size of the inputs is called, by torch.export's symbol.
        pixels: How those inputs that are images are normalised, by NormalisePixels modules at their head; None where
            they come normalised.
    """

    root: nn.Module
    graph: fx.Graph
    signature: Signature
    example: tuple[Tensor, ...]
    origins: Mapping[str, Origin]
    outside: Mapping[str, str]
    template: nn.Module
    sizes: Mapping[str, str]
    pixels: Pixels | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> CapturedGraph:
        # Nothing changes a captured graph, so copies of a simulation share it.
        return self

    def placeholders(self) -> dict[fx.Node, str]:
        """The input nodes, each with its name in the signature."""
        nodes = [node for node in self.graph.nodes if node.op == "placeholder"]
        return dict(zip(nodes, self.signature.inputs, strict=True))

    def tensor_of(self, node: fx.Node) -> Tensor:
        """The parameter, buffer or constant that a get_attr node reads."""
        holder, _, leaf = str(node.target).rpartition(".")
        tensor: Tensor = getattr(self.root.get_submodule(holder), leaf)
        return tensor.detach()

    def shape_of(self, node: fx.Node) -> tuple[int | str, ...]:
        """A tensor node's shape, with "batch" for every size that depends on the batch, and so on."""
        return tuple(name_of(size, self.sizes) for size in node.meta["val"].shape)


def capture(
    model: nn.Module,
    example_inputs: Batch,
    opaque: Sequence[str] = (),
    dynamic_size: bool = False,
    pixels: Pixels | None = None,
) -> CapturedGraph:
    """Captures `model` without changing it.

    Args:
        model: Any module that torch.export can export; its mode (train or eval) is left as it is.
        example_inputs: A tensor, tuple or dict of inputs; dimension 0 of each tensor is the batch. A batch of 1
            is doubled, since torch.export would take 1 for a constant.
        opaque: Submodules that torch.export need not look inside, by dotted name or by class name.
        dynamic_size: Whether dimensions 2 and 3 of 4-d inputs may have other sizes than the example's too.
        pixels: How uint8 [N, C, H, W] inputs become what the model takes; None where it takes what is given.

    Raises:
        CaptureError: torch.export cannot export the model; the message names the line that stands in the way. Or
            what is asked to be opaque is no submodule, or takes or gives something else than tensors.
        ModelError: The model is in another precision than float32.
        InputError: An example input is no tensor, or in another precision.
    """
    _check_module(model)
    given = example_call(example_inputs)
    args, kwargs = given if pixels is None else normalised_call(pixels, *given)
    check_float32(model, pytree.tree_leaves((args, kwargs)))
    template = copy.deepcopy(model)
    own = _sharing_copy(template).eval()
    for parameter in own.parameters():
        parameter.requires_grad_(True)  # else attention takes its fused inference path, which has no ATen form
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    kept = find_opaque(own, opaque, dynamic_size)
    mark_stubs(own, kept.values())
    if dynamic_size:
        check_any_size(own, args, kwargs)
    with _telling_of_inputs(template, example_inputs, args, kwargs), opaque_calls(own, kept, args, kwargs):
        exported = _export(own, args, kwargs, dynamic_size)
        module = exported.module(check_guards=False)
    for holder in (module, template):
        for name, parameter in holder.named_parameters():
            parameter.requires_grad_(name not in frozen)
    root, graph = nn.Module(), module.graph
    graph.owning_module = None  # its targets are looked up under `root` from here on
    _adopt_state(root, module, graph)
    make_functional(graph)
    origins = {n.name: _origin(n) for n in graph.nodes if n.op == "call_function"}
    outside = strip_stubs(graph)
    _restore_modules(graph, root, own)
    for name, path in restore_opaque(graph, root, kept).items():
        origins[name] = replace(origins[name], module=path, type=type(kept[path]).__name__, aten=OPAQUE)
    out_spec = _flatten_output(graph, exported)
    normalize(graph, root, origins)
    leaves = pytree.tree_leaves(given)
    if pixels is not None:
        insert_normalisation(graph, root, origins, pixels, leaves)
    check_ops_of_open_sizes(graph.nodes)
    graph.lint()
    values = {n.name: n.meta["val"] for n in graph.nodes if n.op == "placeholder"}
    signature, sizes = _signature(own, args, kwargs, values, out_spec), names_of_symbols(list(values.values()))
    return CapturedGraph(root, graph, signature, tuple(leaves), origins, outside, template, sizes, pixels)


def _check_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise CaptureError(f"found {named(model)}, wanted an nn.Module; pass the model itself")
    if isinstance(model, torch.jit.ScriptModule):
        raise CaptureError(f"found a {type(model).__name__}, wanted the eager module that it was made of; pass that")


@contextlib.contextmanager
def _telling_of_inputs(
    model: nn.Module, example_inputs: Batch, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Iterator[None]:
    """Where something fails within it, a model that does not take its inputs at all is told so instead."""
    try:
        yield
    except Exception:
        # torch.export and the model raise whatever they like.
        check_call(copy.deepcopy(model).eval(), example_inputs, args, kwargs)
        raise


def _signature(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    values: Mapping[str, Tensor],
    out_spec: pytree.TreeSpec,
) -> Signature:
    """How the model is called and what it returns; `values` are the captured inputs by the graph's names."""
    leaves, in_spec = pytree.tree_flatten((args, kwargs))
    names = tuple(values)
    keywords = (*_positional(model, args), *kwargs)
    return Signature(
        keywords if len(keywords) == len(names) else names,
        in_spec,
        out_spec,
        tuple(Leaf.of(value, tuple(leaf.shape)) for value, leaf in zip(values.values(), leaves, strict=True)),
    )


def _sharing_copy(model: nn.Module) -> nn.Module:
    """A copy whose modules are its own, and whose parameters and buffers are the model's: it costs no memory."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def _export(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_size: bool
) -> torch.export.ExportedProgram:
    shapes = dynamic_shapes((args, kwargs), dynamic_size)
    named = {**_positional(model, shapes[0]), **shapes[1]}

    def attempt() -> torch.export.ExportedProgram:
        with torch.enable_grad(), _quiet_failure():
            return torch.export.export(model, args, kwargs, dynamic_shapes=named)

    try:
        try:
            return attempt()
        except Exception as error:
            if UNKNOWN_OUTPUT not in str(error) or not register_output_dataclasses(model, args, kwargs):
                raise
        return attempt()
    except Exception as error:
        # torch.export raises whatever the model's code raises: any failure here is a model it cannot take.
        raise CaptureError(explain(model, error, dynamic_size)) from error


@contextlib.contextmanager
def _quiet_failure() -> Iterator[None]:
    """Drops what torch.export writes to stderr before it raises: the whole partial graph, and a log line."""
    logger, printed = logging.getLogger("torch.fx.experimental.symbolic_shapes"), io.StringIO()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(printed):
            yield
    finally:
        logger.setLevel(level)
    sys.stderr.write(printed.getvalue())


def _positional(model: nn.Module, args: tuple[Any, ...]) -> dict[str, Any]:
    """Names positional arguments as the model's forward does; *args take the rest as one tuple."""
    named: dict[str, Any] = {}
    rest = list(args)
    for parameter in inspect.signature(model.forward).parameters.values():
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            named[parameter.name] = tuple(rest)
            return named
        if not rest or parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            break
        named[parameter.name] = rest.pop(0)
    return named


def _adopt_state(root: nn.Module, module: nn.Module, graph: fx.Graph) -> None:
    """Puts the exported parameters, buffers and constants under `root`, at their original dotted names."""
    seen: dict[int, Any] = {}
    tensors = [
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ]
    for name, tensor in tensors:
        owner, leaf = owner_of(root, name)
        tensor = seen.setdefault(id(tensor), tensor)
        if isinstance(tensor, nn.Parameter):
            owner.register_parameter(leaf, tensor)
        else:
            owner.register_buffer(leaf, tensor)
    known = {name for name, _ in tensors}
    for target in {str(node.target) for node in graph.nodes if node.op == "get_attr"} - known:
        # A tensor made in forward, which export lifted out; it is no part of the user's state_dict.
        owner, leaf = owner_of(root, target)
        constant = getattr(module.get_submodule(target.rpartition(".")[0]), leaf)
        owner.register_buffer(leaf, constant.detach().clone(), persistent=False)


def _restore_modules(graph: fx.Graph, root: nn.Module, model: nn.Module) -> None:
    _restore_batch_norm(graph, root, model)
    _restore_dropout(graph, root, model)


def _restore_batch_norm(graph: fx.Graph, root: nn.Module, model: nn.Module) -> None:
    """Makes batch norms modules again: the user's own, so that eps, momentum and affine are untouched."""
    for node in list(graph.nodes):
        if node.target not in BATCH_NORMS:
            continue
        x, running_mean = node.args[0], node.args[3]
        path = innermost_module(node)
        found = model.get_submodule(path) if path else None
        if isinstance(found, nn.modules.batchnorm._BatchNorm) and running_mean is not None:
            owner, leaf = owner_of(root, path)
            own: nn.Module = copy.deepcopy(found)
            state = owner._modules.get(leaf)
            assert state is not None
            own._parameters.update(state._parameters)  # the very tensors of the graph, tied ones included
            own._buffers.update(state._buffers)
            owner.add_module(leaf, own)
        else:
            continue  # functional, or normalising by batch statistics: stays an op, and so in float
        with graph.inserting_before(node):
            module = graph.call_module(path, (x,))
        module.meta = dict(node.meta)
        _take_name(graph, node, module)


def _restore_dropout(graph: fx.Graph, root: nn.Module, model: nn.Module) -> None:
    for node in list(graph.nodes):
        if node.target not in DROPOUTS:
            continue
        x, p, _ = node.args
        path = innermost_module(node)
        found = model.get_submodule(path) if path else None
        if not isinstance(found, nn.modules.dropout._DropoutNd):
            found, path = DROPOUTS[node.target](p), f"{path}.{node.name}" if path else node.name
        owner, leaf = owner_of(root, path)
        owner.add_module(leaf, copy.deepcopy(found))
        with graph.inserting_before(node):
            module = graph.call_module(path, (x,))
        module.meta = dict(node.meta)
        _take_name(graph, node, module)


def _take_name(graph: fx.Graph, old: fx.Node, new: fx.Node) -> None:
    """Replaces `old` by `new` under the old node's name, which origins are kept by."""
    old.replace_all_uses_with(new)
    name = old.name
    graph.erase_node(old)
    new._rename(name)
    new.name = name


def _flatten_output(graph: fx.Graph, exported: torch.export.ExportedProgram) -> pytree.TreeSpec:
    """Makes the graph return a flat tuple of tensors, and its inputs flat placeholders."""
    output = next(node for node in graph.nodes if node.op == "output")
    spec: pytree.TreeSpec | None = exported.call_spec.out_spec
    leaves = pytree.tree_leaves(output.args[0])
    if len(leaves) == 1 and leaves[0].op == "call_function" and "tree_unflatten" in str(leaves[0].target):
        wrapper = leaves[0]
        leaves = pytree.tree_leaves(wrapper.args[0])
    for leaf in leaves:
        if not isinstance(leaf, fx.Node):
            raise CaptureError(f"found the constant {leaf!r} among the outputs, wanted tensors only: leave it out")
    output.args = (tuple(leaves),)
    graph.set_codegen(fx.graph.CodeGen())
    assert spec is not None
    return spec


def _origin(node: fx.Node) -> Origin:
    path, type_name = _innermost(node)
    op = node.target.__name__ if node.target is operator.getitem else str(node.target).removesuffix(".default")
    return Origin(path, type_name.rsplit(".", 1)[-1], op, source_line(node))


def _innermost(node: fx.Node) -> tuple[str, str]:
    stack = node.meta.get("nn_module_stack") or {}
    path, type_name = next(reversed(list(stack.values())), ("", ""))
    # A module called twice is named `conv@1` on its second call.
    return re.sub(r"@\d+", "", path), type_name if isinstance(type_name, str) else type_name.__name__


def innermost_module(node: fx.Node) -> str:
    """Dotted name of the module whose forward computes a node; "" for the model itself, or where it is not known."""
    return _innermost(node)[0]
