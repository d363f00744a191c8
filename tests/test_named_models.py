"""Models by name: what the user is told where the package is missing or broken, and where the name is."""

from __future__ import annotations

import importlib
import re

import pytest
from torch import nn

from edgeqat.errors import ModelError
from edgeqat.factory import build_model
from edgeqat.named_models import named_model
from edgeqat.recipe import ModelSection

NAMES = {"timm": "timm:mobilenetv3_small_100", "torchvision": "torchvision:mobilenet_v3_small"}


def importable(package: str) -> bool:
    try:
        importlib.import_module(package)
    except Exception:  # noqa: BLE001  built for another torch, it fails in ways of its own
        return False
    return True


@pytest.mark.parametrize("package", NAMES)
def test_what_cannot_be_imported_is_said_in_a_line_with_the_way_out(package: str) -> None:
    if importable(package):
        pytest.skip(f"{package} can be imported here")
    with pytest.raises(ModelError) as refused:
        named_model(NAMES[package])
    message = str(refused.value)
    cause = rf"{package} (is not installed|cannot be imported beside torch .+ \(\w+: .+\); install the build for it)"
    assert re.fullmatch(rf"model\.factory {NAMES[package]}: {cause}: pip install 'edgeqat\[{package}\]'", message)


@pytest.mark.parametrize("package", NAMES)
def test_a_model_is_made_by_its_name(package: str) -> None:
    if not importable(package):
        pytest.skip(f"{package} cannot be imported beside this torch")
    model = build_model(ModelSection(factory=NAMES[package], args={"num_classes": 10}), seed=0)
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    assert last.out_features == 10
    with pytest.raises(ModelError, match=rf"no model of that name; did you mean .*{NAMES[package].split(':')[1]}"):
        named_model(NAMES[package].replace("small", "smal"))


def test_other_factories_are_not_names_of_models() -> None:
    assert named_model("edgeqat.zoo:edge_model") is None
    assert named_model("timm.models:resnet18") is None
