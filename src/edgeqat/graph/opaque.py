"""Opaque submodules: on request one is kept in float as a whole, so that torch.export need not look inside.

While capturing, a custom op stands for each call of it. How many outputs a call has, and of which sizes, is seen by
running the model on its example inputs with two batches; afterwards the module itself takes the op's place.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.utils import _pytree as pytree

from edgeqat.errors import CaptureError
from edgeqat.graph.pixels import NormalisePixels
from edgeqat.graph.submodules import owner_of

__all__ = ["OPAQUE", "OPAQUE_REASON", "find_opaque", "is_opaque", "opaque_calls", "restore_opaque"]

OPAQUE = "opaque"
"""What stands for the ATen op of an opaque module."""

OPAQUE_REASON = "it is opaque: kept in float as a whole"

Shape = tuple[int, ...]


@dataclass(frozen=True)
class _Call:
    """What a call of an opaque module took and gave, with two batches.

    Attributes:
        inputs: Of each input tensor, its shape with either batch.
        outputs: The same of each output tensor.
        dtypes: Of each output tensor.
        single: Whether it gave a tensor, not a tuple of them.
    """

    inputs: tuple[tuple[Shape, Shape], ...]
    outputs: tuple[tuple[Shape, Shape], ...]
    dtypes: tuple[torch.dtype, ...]
    single: bool

    def sizes(self, inputs: Sequence[Tensor]) -> list[list[Any]] | None:
        """The sizes of the outputs for symbolic inputs: linear in a size that follows the batch; None if not so."""
        growing = [
            (small, large, tensor.shape[dim])
            for tensor, shapes in zip(inputs, self.inputs, strict=True)
            for dim, (small, large) in enumerate(zip(*shapes, strict=True))
            if small != large
        ]
        found = [[_size(a, b, growing) for a, b in zip(*shapes, strict=True)] for shapes in self.outputs]
        return None if any(size is None for sizes in found for size in sizes) else found


def _size(small: int, large: int, growing: Sequence[tuple[int, int, Any]]) -> Any:
    """A size that is `small` with one batch and `large` with the other, by those that are known to grow."""
    if small == large:
        return small
    for a, b, symbol in growing:
        if (a, b) == (small, large):
            return symbol
    for a, b, symbol in growing:
        times, rest = divmod(large - small, b - a)
        if rest == 0 and small >= times * a:  # else a smaller batch would have a negative size
            return small - times * a + times * symbol
    return None


_calls: dict[str, list[_Call]] = {}
"""Of the capture that is going on: every call of each opaque module, in order, by its name."""


@torch.library.custom_op("edgeqat::opaque", mutates_args=())
def _opaque(inputs: Sequence[Tensor], name: str, call: int, single: bool) -> list[Tensor]:
    raise NotImplementedError("it only stands in a graph that is being captured")


@_opaque.register_fake
def _(inputs: Sequence[Tensor], name: str, call: int, single: bool) -> list[Tensor]:
    recorded = _calls[name][call]
    sizes = recorded.sizes(inputs)
    assert sizes is not None  # checked when it was recorded
    return [inputs[0].new_empty(s, dtype=dtype) for s, dtype in zip(sizes, recorded.dtypes, strict=True)]


def is_opaque(module: nn.Module) -> bool:
    """Whether a module that a captured graph calls is opaque; the others are those that capture puts there."""
    return not isinstance(module, (_BatchNorm, _DropoutNd, NormalisePixels))


def find_opaque(model: nn.Module, wanted: Sequence[str], dynamic_size: bool) -> dict[str, nn.Module]:
    """The submodules that are asked for by dotted name or by class name, without those inside one another.

    Raises:
        CaptureError: A name is none of a submodule, or the height and width of images are to stay open.
    """
    if dynamic_size and wanted:
        raise CaptureError(
            f"found dynamic_size with the opaque {wanted[0]!r}, whose sizes are known for the example's height and "
            "width only; prepare without one of the two"
        )
    if isinstance(wanted, str):
        raise CaptureError(f"found opaque {wanted!r}, wanted a list of names, such as [{wanted!r}]")
    found: dict[str, nn.Module] = {}
    below = {name: module for name, module in model.named_modules() if name}
    for entry in wanted:
        matches = {name for name, module in below.items() if entry in (name, type(module).__name__)}
        if not matches:
            known = ", ".join(name for name, _ in model.named_children())
            raise CaptureError(
                f"found no submodule {entry!r} to keep opaque, wanted a dotted name or a class below the model, whose "
                f"children are {known or 'none'}"
            )
        found |= {name: below[name] for name in matches}
    return {name: module for name, module in found.items() if not any(name.startswith(f"{other}.") for other in found)}


@contextlib.contextmanager
def opaque_calls(
    model: nn.Module, opaque: Mapping[str, nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Iterator[None]:
    """Within it, every opaque submodule of `model`, in eval mode, is a custom op instead.

    Raises:
        CaptureError: One takes or gives something else than tensors, or sizes that do not follow its inputs'; or the
            model does not run on its example inputs.
    """
    if not opaque:
        yield
        return
    _calls.update(_record(model, list(opaque), args, kwargs))
    try:
        for name, module in opaque.items():
            module.__dict__["forward"] = _standing_in(name, _calls[name])
        yield
    finally:
        _calls.clear()
        for module in opaque.values():
            module.__dict__.pop("forward", None)


def _standing_in(name: str, calls: Sequence[_Call]) -> Any:
    # torch.export runs a model several times; each time the calls come in the same order.
    indexes = itertools.cycle(range(len(calls)))

    def forward(*inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        index = next(indexes)
        single = calls[index].single
        outputs: list[Tensor] = torch.ops.edgeqat.opaque(list(inputs), name, index, single)
        return outputs[0] if single else tuple(outputs)

    return forward


def _record(
    model: nn.Module, names: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, list[_Call]]:
    """Runs a copy of the model with the example's batch, and with one sample more."""
    larger: Any = pytree.tree_map(lambda x: torch.cat([x, x[:1]]), (args, kwargs))
    runs = [_run(model, names, *call) for call in ((args, kwargs), larger)]
    found: dict[str, list[_Call]] = {}
    for name in names:
        small, large = (run[name] for run in runs)
        if not small or len(small) != len(large):
            times = f"{len(small)} times" if len(small) == len(large) else f"{len(small)} or {len(large)} times"
            raise CaptureError(f"opaque {name!r} is called {times}, wanted at least once, however large the batch")
        found[name] = [_call_of(name, *pair) for pair in zip(small, large, strict=True)]
    return found


def _run(
    model: nn.Module, names: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, list[tuple[Any, Any]]]:
    """(inputs, output) of every call of each named submodule."""
    own, found = copy.deepcopy(model), dict[str, list[tuple[Any, Any]]]((name, []) for name in names)
    for name in names:

        def keep(_: nn.Module, inputs: Any, keywords: Any, output: Any, name: str = name) -> None:
            found[name].append((list(inputs) + [keywords] * bool(keywords), output))

        own.get_submodule(name).register_forward_hook(keep, with_kwargs=True)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            own(*args, **kwargs)
    except Exception as error:
        # The model is the user's code, which may raise anything.
        batch = len(pytree.tree_leaves((args, kwargs))[0])
        raise CaptureError(
            f"{type(model).__name__} does not run on its example inputs with a batch of {batch}: "
            f"{type(error).__name__}: {error}"
        ) from error
    return found


def _call_of(name: str, small: tuple[Any, Any], large: tuple[Any, Any]) -> _Call:
    (inputs, output), (more_inputs, more_output) = small, large
    single = isinstance(output, Tensor)
    outputs, more_outputs = ([output], [more_output]) if single else (output, more_output)
    if not inputs or not all(isinstance(tensor, Tensor) for tensor in inputs):
        found = ", ".join(type(x).__name__ for x in inputs) or "none"
        raise CaptureError(f"opaque {name!r} takes {found}, wanted tensors by position; name what holds it instead")
    if not isinstance(outputs, (list, tuple)) or not all(isinstance(tensor, Tensor) for tensor in outputs):
        raise CaptureError(
            f"opaque {name!r} gives a {type(output).__name__}, wanted a tensor or a tuple of them; "
            "name what holds it instead"
        )
    if len(outputs) != len(more_outputs):
        raise CaptureError(f"opaque {name!r} gives {len(outputs)} or {len(more_outputs)} tensors: name what holds it")
    shapes = [
        tuple((tuple(a.shape), tuple(b.shape)) for a, b in zip(*pair, strict=True))
        for pair in ((inputs, more_inputs), (outputs, more_outputs))
    ]
    call = _Call(shapes[0], shapes[1], tuple(tensor.dtype for tensor in outputs), single)
    if any(len(a) != len(b) for a, b in call.outputs) or call.sizes(inputs) is None:
        raise CaptureError(f"opaque {name!r} gives sizes that do not follow those of its inputs: name what holds it")
    return call


def restore_opaque(graph: fx.Graph, root: nn.Module, opaque: Mapping[str, nn.Module]) -> dict[str, str]:
    """Puts the opaque modules in the places of their custom ops, in `graph` and under `root`, in place.

    Returns:
        The name of each call's node, with the dotted name of its module.
    """
    nodes: dict[str, str] = {}
    for node in list(graph.nodes):
        if node.target is not torch.ops.edgeqat.opaque.default:
            continue
        inputs, path, _, single = node.args
        owner, leaf = owner_of(root, path)
        owner.add_module(leaf, opaque[path])  # torch.export keeps the tensors themselves, so tied ones stay tied
        with graph.inserting_before(node):
            module = graph.call_module(path, tuple(inputs))
        module.meta = dict(node.meta)
        if single:
            module.meta["val"] = node.meta["val"][0]
            for item in list(node.users):
                item.replace_all_uses_with(module)
                graph.erase_node(item)
        node.replace_all_uses_with(module)
        name = node.name
        graph.erase_node(node)
        module._rename(name)
        module.name = name
        nodes[name] = path
    return nodes
