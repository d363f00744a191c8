"""Models by name from timm and torchvision: `timm:mobilenetv3_small_100`, `torchvision:mobilenet_v3_small`."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from edgeqat.callables import USER_ERRORS
from edgeqat.errors import ModelError

__all__ = ["named_model"]


def named_model(factory: str) -> Callable[..., nn.Module] | None:
    """What makes the model that a recipe's `model.factory` names; None where it names none of these packages.

    Raises:
        ModelError: The package cannot be imported, or has no model of that name.
    """
    package, _, name = factory.partition(":")
    if package == "timm":
        timm = _import("timm", factory)
        # timm knows a model with and without the tag of its weights: resnet18, resnet18.a1_in1k.
        return _known(factory, name, timm.is_model(name), timm.list_models(), timm.create_model)
    if package == "torchvision":
        models = _import("torchvision.models", factory)
        names = models.list_models()
        return _known(factory, name, name in names, names, models.get_model)
    return None


def _import(module: str, factory: str) -> Any:
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except USER_ERRORS as error:  # importing it fails in many ways beside a torch that it was not built for
        missing = isinstance(error, ModuleNotFoundError) and error.name == package
        found = f"cannot be imported beside torch {torch.__version__} ({_line(error)}); install the build for it"
        what = "is not installed" if missing else found
        raise ModelError(f"model.factory {factory}: {package} {what}: pip install 'edgeqat[{package}]'") from error


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _known(
    factory: str, name: str, known: bool, names: list[str], create: Callable[..., nn.Module]
) -> Callable[..., nn.Module]:
    if not known:
        near = difflib.get_close_matches(name, names, n=3)
        hint = f"did you mean {', '.join(near)}?" if near else f"it has {len(names)} others"
        raise ModelError(f"model.factory {factory}: no model of that name; {hint}")
    return lambda **args: create(name, **args)
