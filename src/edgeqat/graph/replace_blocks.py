"""Replacing blocks of a model by others that compute the same, before it is captured."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from edgeqat.callables import USER_ERRORS
from edgeqat.errors import CaptureError, PlanError
from edgeqat.graph.example import example_call
from edgeqat.graph.patterns import (
    Fusion,
    FusionMatch,
    FusionPattern,
    Refusal,
    ask,
    did_you_mean,
    is_class,
    patterns_of,
)
from edgeqat.graph.pixels import Pixels, normalised_call
from edgeqat.program import BATCH_DIM
from edgeqat.signature import Batch

__all__ = ["replace_blocks"]

TOLERANCE = 1e-4
"""Largest difference of outputs, as a share of the largest output: what float32 rounding of other sums leaves."""

Calls = Mapping[nn.Module, "list[tuple[tuple[Any, ...], dict[str, Any], Any]]"]
"""(args, kwargs, output) of each call of a module."""


def replace_blocks(
    model: nn.Module, example_inputs: Batch, fusions: Sequence[Fusion], pixels: Pixels | None = None
) -> tuple[nn.Module, list[Refusal]]:
    """A copy of `model` with the replacements of the patterns that have one, in their order, and what checks refused.

    The model itself, if there is no such pattern. Each replacement is held against what it replaces, in eval mode, on
    what it is given when the model runs on the example inputs.

    Raises:
        PlanError: A pattern matches nothing, or its replacement fails or computes something else.
    """
    patterns = [pattern for pattern in patterns_of(fusions) if pattern.replace is not None]
    refusals: list[Refusal] = []
    if not patterns or not isinstance(model, nn.Module):  # what is no module, capture refuses
        return model, refusals
    args, kwargs = example_call(example_inputs)
    if pixels is not None:
        args, kwargs = normalised_call(pixels, args, kwargs)
    changed = copy.deepcopy(model)
    for pattern in patterns:
        names: dict[nn.Module, str] = {}
        for name, module in changed.named_modules():
            inside = any(name.startswith(f"{outer}." if outer else "") for outer in names.values())
            if is_class(module, pattern.classes[0]) and not inside:
                names[module] = name
        if not names:
            wanted = pattern.classes[0] if isinstance(pattern.classes[0], str) else pattern.classes[0].__name__
            known = {type(module).__name__ for module in changed.modules()}
            raise PlanError(
                f"fusion pattern {pattern.name!r} matches nothing: the model has no {wanted}; "
                + did_you_mean([wanted], known)
            )
        calls = _calls(changed, names, args, kwargs)
        made: dict[nn.Module, nn.Module] = {}
        for module, name in names.items():
            match = _match(pattern, name, module, calls)
            reason = ask(pattern, match)
            if reason:
                refusals.append(Refusal(match.name, f"refused by the check of {pattern.name}: {reason}"))
            else:
                made[module] = _replacement(pattern, match.name, module, calls)
        changed = _with(changed, made)
    return changed, refusals


def _calls(model: nn.Module, blocks: Mapping[nn.Module, str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Calls:
    """What each block is given and gives, in eval mode. The model is left in the modes it was in."""
    calls: dict[nn.Module, list[tuple[tuple[Any, ...], dict[str, Any], Any]]] = {block: [] for block in blocks}

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        # Copies: what follows may work in place.
        calls[module].append(_cloned((args, kwargs, output)))

    modes = {module: module.training for module in model.modules()}
    hooks = [block.register_forward_hook(record, with_kwargs=True) for block in blocks]
    try:
        with torch.no_grad():
            model.eval()(*args, **kwargs)
    except USER_ERRORS as error:
        # The model's own code may raise anything; capture would meet the same.
        text = " ".join(str(error).split())
        raise CaptureError(
            f"{type(model).__name__} fails on the example inputs: {type(error).__name__}: {text}"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes.items():
            module.training = mode
    return calls


def _cloned(value: Any) -> Any:
    return pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, value)


def _match(pattern: FusionPattern, name: str, module: nn.Module, calls: Calls) -> FusionMatch:
    modules = {f"{name}.{inner}".strip("."): m for inner, m in module.named_modules()}
    given = [(args, kwargs) for args, kwargs, _ in calls[module][:1]]
    outputs = [output for _, _, output in calls[module][:1]]
    return FusionMatch(pattern.name, name or "<model>", modules, _shapes(given), _shapes(outputs))


def _shapes(values: Any) -> tuple[tuple[int | str, ...], ...]:
    """Dimension 0 is taken for the batch."""
    leaves = [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor)]
    return tuple((BATCH_DIM, *leaf.shape[1:]) if leaf.dim() else () for leaf in leaves)


def _replacement(pattern: FusionPattern, name: str, module: nn.Module, calls: Calls) -> nn.Module:
    what = f"the replacement of {name} by fusion pattern {pattern.name!r}"
    assert pattern.replace is not None
    try:
        made = pattern.replace(copy.deepcopy(module))
        if isinstance(made, nn.Module):
            made.eval()
            with torch.no_grad():
                outputs = [made(*args, **kwargs) for args, kwargs, _ in _cloned(calls[module])]
            made.train(module.training)
    except USER_ERRORS as error:
        text = " ".join(str(error).split())
        raise PlanError(f"{what} failed: {type(error).__name__}: {text}") from error
    if not isinstance(made, nn.Module):
        raise PlanError(f"{what} is a {type(made).__name__}, wanted an nn.Module")
    for output, (_, _, expected) in zip(outputs, calls[module], strict=True):
        difference = _difference(output, expected)
        if difference:
            raise PlanError(f"{what} computes something else: {difference}; it must compute the same in eval mode")
    return made


def _difference(found: Any, expected: Any) -> str:
    """How two outputs differ by more than the tolerance, "" if they do not."""
    pairs = [pytree.tree_flatten(value) for value in (found, expected)]
    (leaves, spec), (wanted, wanted_spec) = pairs
    if spec != wanted_spec:
        return f"it returns {spec}, wanted {wanted_spec}"
    for leaf, want in zip(leaves, wanted, strict=True):
        if not isinstance(want, Tensor):
            if leaf != want:
                return f"it returns {leaf!r}, wanted {want!r}"
            continue
        if not isinstance(leaf, Tensor) or leaf.shape != want.shape or leaf.dtype != want.dtype:
            shape = (tuple(leaf.shape), leaf.dtype) if isinstance(leaf, Tensor) else type(leaf).__name__
            return f"it returns {shape}, wanted {(tuple(want.shape), want.dtype)}"
        if want.numel() == 0:
            continue
        difference, largest = float((leaf.double() - want.double()).abs().max()), float(want.double().abs().max())
        if not difference <= TOLERANCE * largest:  # NaN is a difference
            return f"outputs of up to {largest:.3g} differ by up to {difference:.3g}, wanted {TOLERANCE:g} of them"
    return ""


def _with(model: nn.Module, made: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """The model with these modules in the places of others, in each place that they have."""
    if model in made:
        return made[model]
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and child in made:
                parent._modules[name] = made[child]
    return model
