"""What a recipe names by string: models, weights, losses, settings; and how each is refused."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from edgeqat.errors import ModelError, PlanError, RecipeError
from edgeqat.factory import build_fusions, build_loss, build_mapping, build_model, check_not_random
from edgeqat.graph.patterns import FusionPattern
from edgeqat.planning import plan
from edgeqat.qconfig import ActivationConfig, QConfig, WeightConfig
from edgeqat.qconfig_mapping import LayerId
from edgeqat.recipe import ModelSection
from edgeqat.recipe_quantize import QuantizeSection

CODE = """
import torch
from torch import nn

from edgeqat import FusionPattern

number = 3

class Gate(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(2, 2)
    def forward(self, x):
        return x * torch.sigmoid(self.fc(x))

def gated():
    return nn.Sequential(Gate(), nn.Linear(2, 1))

gate = FusionPattern("gate", modules=Gate)

def pretrained():
    model = nn.Linear(2, 3)
    torch.nn.init.ones_(model.weight)
    torch.nn.init.zeros_(model.bias)
    return model

def with_new_head():
    return nn.Sequential(pretrained(), nn.Linear(3, 2))

def make(width=4):
    return nn.Sequential(nn.Linear(2, width), nn.ReLU(), nn.Linear(width, 1))

def broken(width=4):
    raise RuntimeError(f"no width {width}")

def no_module():
    return "a string"

def loss(outputs, targets):
    return (outputs - targets).abs().mean()
"""


@pytest.fixture
def code(tmp_path: Path) -> Path:
    path = tmp_path / "net.py"
    path.write_text(CODE, encoding="utf-8")
    return path


def refusal(section: ModelSection) -> str:
    with pytest.raises(ModelError) as caught:
        build_model(section, seed=0)
    message = str(caught.value)
    assert "\n" not in message
    return message


def of(target: str, weights: Path | None = None, **args: Any) -> ModelSection:
    return ModelSection(factory=target, args=args, weights=None if weights is None else str(weights))


def test_module_and_callable() -> None:
    model = build_model(of("edgeqat.zoo:resnet20", num_classes=7), seed=0)
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 7)


def test_file_and_callable(code: Path) -> None:
    model = build_model(of(f"{code}:make", width=5), seed=0)
    assert [tuple(p.shape) for p in model.parameters()] == [(5, 2), (5,), (1, 5), (1,)]


def test_seed_decides_the_weights(code: Path) -> None:
    first, same, other = (build_model(of(f"{code}:make"), seed)[0].weight for seed in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_random_weights_are_told_from_loaded_ones(code: Path, tmp_path: Path) -> None:
    """They change with the seed; whatever a factory loads by itself does not."""
    check_not_random(of(f"{code}:pretrained"), seed=0)
    weights = tmp_path / "w.safetensors"
    safetensors.torch.save_file(build_model(of(f"{code}:make"), 0).state_dict(), weights)
    check_not_random(of(f"{code}:make", weights), seed=0)
    for target, words in (("make", "4 of its 4 parameters"), ("with_new_head", "2 of its 4 parameters")):
        with pytest.raises(ModelError, match="model.weights is null and nothing is trained, so ") as caught:
            check_not_random(of(f"{code}:{target}"), seed=0)
        assert words in str(caught.value) and "set model.weights to a trained state_dict, or train it" in str(
            caught.value
        )
        assert "\n" not in str(caught.value)


def test_looking_for_random_weights_keeps_the_import_that_patterns_use(code: Path) -> None:
    model = build_model(of(f"{code}:gated"), seed=0)
    with pytest.raises(ModelError, match="random weights"):
        check_not_random(of(f"{code}:gated"), seed=0)
    (pattern,) = build_fusions(QuantizeSection(fusions=[f"{code}:gate"]))
    assert isinstance(pattern, FusionPattern) and pattern.modules is type(model[0])


@pytest.mark.parametrize("target", ["make", ":make", "net:", "", "net.py"])
def test_name_of_another_form(target: str) -> None:
    assert refusal(of(target)) == f"model.factory: found {target!r}, wanted module:callable or file.py:callable"


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("no_such_module_at_all:make", "cannot import no_such_module_at_all: ModuleNotFoundError: No module named"),
        ("edgeqat.nothing:make", "cannot import edgeqat.nothing: ModuleNotFoundError"),
        ("..zoo:make", "cannot import ..zoo: TypeError"),
        ("nowhere/net.py:make", "found no file nowhere/net.py"),
        ("edgeqat.zoo:resnet21", "edgeqat.zoo has no callable 'resnet21'; did you mean resnet20?"),
        ("edgeqat.zoo:__all__", "edgeqat.zoo has no callable '__all__'"),
    ],
)
def test_cannot_be_resolved(target: str, words: str) -> None:
    assert refusal(of(target)).startswith(f"model.factory: {words}")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def make(:\n", "SyntaxError: "),
        ("import no_such_module_at_all\n", "ModuleNotFoundError: No module named 'no_such_module_at_all'"),
        ("raise ValueError('at import')\n", "ValueError: at import"),
    ],
    ids=["syntax", "import", "raises"],
)
def test_file_that_cannot_be_imported(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "bad.py"
    path.write_text(text)
    assert refusal(of(f"{path}:make")).startswith(f"model.factory: cannot import {path}: {words}")


def test_not_callable(code: Path) -> None:
    assert refusal(of(f"{code}:number")) == f"model.factory: {code} has no callable 'number'"


def test_factory_that_raises(code: Path) -> None:
    found = refusal(of(f"{code}:broken", width=9))
    assert found == f"model.factory {code}:broken failed with model.args {{'width': 9}}: RuntimeError: no width 9"


def test_arguments_that_the_factory_does_not_take(code: Path) -> None:
    found = refusal(of(f"{code}:make", height=9))
    assert "failed with model.args {'height': 9}: TypeError: make() got an unexpected keyword argument" in found


def test_our_own_refusals_pass_through_unwrapped() -> None:
    assert refusal(of("edgeqat.zoo:resnet20", num_classes=0)) == "num_classes is 0, wanted at least 1"


def test_factory_that_returns_no_module(code: Path) -> None:
    assert refusal(of(f"{code}:no_module")) == f"model.factory {code}:no_module returned a str, wanted an nn.Module"


# Weights.


def build(code: Path, weights: Path) -> nn.Module:
    return build_model(of(f"{code}:make", weights), seed=1)


def state(code: Path) -> dict[str, torch.Tensor]:
    return dict(build_model(of(f"{code}:make"), seed=0).state_dict())


def wrapped(found: dict[str, torch.Tensor], path: Path) -> None:
    torch.save({"state_dict": found, "epoch": 3}, path)


@pytest.mark.parametrize(
    ("name", "save"),
    [
        ("w.safetensors", safetensors.torch.save_file),
        ("w.pt", torch.save),
        ("w.pth", lambda found, path: torch.save(found, path, _use_new_zipfile_serialization=False)),
        ("w.ckpt", wrapped),
    ],
    ids=["safetensors", "torch", "old torch", "checkpoint"],
)
def test_weights_are_loaded(code: Path, tmp_path: Path, name: str, save: Callable[..., Any]) -> None:
    wanted = state(code)
    save(wanted, tmp_path / name)
    found = build(code, tmp_path / name).state_dict()
    assert list(found) == list(wanted)
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_missing_weights_file(code: Path, tmp_path: Path) -> None:
    path = tmp_path / "none.safetensors"
    found = refusal(of(f"{code}:make", path))
    assert found == f"found no weights file {path}; check model.weights, or set it to null to train from scratch"


def test_missing_and_extra_keys_are_named(code: Path, tmp_path: Path) -> None:
    found = state(code)
    found["head.weight"] = found.pop("2.weight")
    safetensors.torch.save_file(found, tmp_path / "w.safetensors")
    message = refusal(of(f"{code}:make", tmp_path / "w.safetensors"))
    assert message.endswith("does not fit the model: missing 2.weight, not in the model head.weight")


def test_many_missing_keys_are_counted(tmp_path: Path) -> None:
    safetensors.torch.save_file({}, tmp_path / "w.safetensors")
    message = refusal(of("edgeqat.zoo:resnet20", tmp_path / "w.safetensors"))
    assert "missing conv1.weight, bn1.weight, bn1.bias and " in message
    assert message.endswith(" more, not in the model nothing")


def test_wrong_shape_is_named(code: Path, tmp_path: Path) -> None:
    safetensors.torch.save_file(state(code) | {"0.weight": torch.zeros(4, 3)}, tmp_path / "w.safetensors")
    message = refusal(of(f"{code}:make", tmp_path / "w.safetensors"))
    assert message.endswith("does not fit the model: 0.weight has shape (4, 3), wanted (4, 2)")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_weights_of_a_wrapped_model(code: Path, tmp_path: Path, prefix: str) -> None:
    wrapped = {prefix + name: tensor for name, tensor in state(code).items()}
    safetensors.torch.save_file(wrapped, tmp_path / "w.safetensors")
    message = refusal(of(f"{code}:make", tmp_path / "w.safetensors"))
    assert f"every name in it begins with {prefix!r}, as DataParallel, " in message
    assert message.endswith("save the state_dict of the model inside, model.module or model._orig_mod")


@pytest.mark.parametrize("content", [b"\x89PNG\r\n\x1a\n and more", b"a text file", b""], ids=["png", "text", "empty"])
def test_what_is_no_checkpoint(code: Path, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "w.pt").write_bytes(content)
    message = refusal(of(f"{code}:make", tmp_path / "w.pt"))
    assert "holds pickled code" not in message
    if content:
        assert message.endswith("w.pt is no checkpoint, wanted .safetensors or what torch.save writes")


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("name", ["w.pt", "w.pth", "w.bin"])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])
def test_pickled_code_is_refused_and_not_executed(code: Path, tmp_path: Path, name: str, zipped: bool) -> None:
    marker, path = tmp_path / "executed", tmp_path / name
    torch.save({**state(code), "x": Malicious(marker)}, path, _use_new_zipfile_serialization=zipped)
    message = refusal(of(f"{code}:make", path))
    assert message.startswith(f"{path} holds pickled code, which edgeqat does not run; save the state_dict alone")
    assert not marker.exists()
    torch.load(path, weights_only=False)  # what it would have done
    assert marker.exists()


def test_pickled_code_under_the_name_of_safetensors(code: Path, tmp_path: Path) -> None:
    marker, path = tmp_path / "executed", tmp_path / "w.safetensors"
    torch.save(Malicious(marker), path)
    assert "cannot be read as weights" in refusal(of(f"{code}:make", path))
    assert not marker.exists()


def test_whole_module_is_refused(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "w.pt")
    assert "holds pickled code" in refusal(of("torch.nn:Identity", tmp_path / "w.pt"))


@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, torch.zeros(2)], ids=["list", "numbers", "tensor"])
def test_torch_file_without_a_state_dict(code: Path, tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "w.pt")
    assert refusal(of(f"{code}:make", tmp_path / "w.pt")).endswith(
        "holds no state_dict of tensors; save model.state_dict()"
    )


@pytest.mark.parametrize("keep", [0, 7, 60, -4], ids=["empty", "in the length", "in the header", "in the data"])
def test_truncated_safetensors(code: Path, tmp_path: Path, keep: int) -> None:
    path = tmp_path / "w.safetensors"
    safetensors.torch.save_file(state(code), path)
    path.write_bytes(path.read_bytes()[:keep])
    assert refusal(of(f"{code}:make", path)).startswith(f"{path} cannot be read as weights: ")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])
@pytest.mark.parametrize("keep", [0, 50, -200], ids=["empty", "start", "end"])
def test_truncated_torch_file(code: Path, tmp_path: Path, zipped: bool, keep: int) -> None:
    path = tmp_path / "w.pt"
    torch.save(state(code), path, _use_new_zipfile_serialization=zipped)
    path.write_bytes(path.read_bytes()[:keep])
    assert refusal(of(f"{code}:make", path)).startswith(f"{path} cannot be read as weights")


def test_weights_file_of_junk(code: Path, tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    path.write_bytes(b"hello, these are no weights at all")
    assert refusal(of(f"{code}:make", path)).startswith(f"{path} ")


def test_weights_that_are_a_folder(code: Path, tmp_path: Path) -> None:
    assert refusal(of(f"{code}:make", tmp_path)).startswith(f"found no weights file {tmp_path}")


# Losses and settings.


def test_losses(code: Path) -> None:
    outputs, targets = torch.tensor([[2.0], [4.0]]), torch.tensor([[1.0], [1.0]])
    assert build_loss("mse")(outputs, targets).item() == 5
    assert build_loss(f"{code}:loss")(outputs, targets).item() == 2
    logits = torch.tensor([[0.0, 0.0]])
    assert build_loss("cross_entropy")(logits, torch.tensor([0])).item() == pytest.approx(0.6931472)


def test_unknown_loss(code: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        build_loss("crossentropy")
    assert str(caught.value) == (
        "task.loss: found the loss 'crossentropy', wanted one of cross_entropy, mse, l1, "
        "binary_cross_entropy_with_logits, or module:callable"
    )
    with pytest.raises(ModelError, match=r"task.loss: .* has no callable 'nothing'"):
        build_loss(f"{code}:nothing")


def test_overrides_become_a_mapping_with_its_precedence() -> None:
    section = QuantizeSection.model_validate(
        {
            "weights": {"bits": 8, "per_channel": False},
            "activations": {"observer": "minmax"},
            "overrides": [
                {"module": "fc", "quantize": False},
                {"regex": r"layer\d", "weights": {"bits": 4}},
                {"regex": r"layer.*", "weights": {"bits": 2}},
                {"type": "Conv2d", "activations": {"observer": "histogram"}},
                {"module": "layer1", "activations": {"observer": "moving_average"}},
            ],
        }
    )
    mapping = build_mapping(section)
    base = QConfig(ActivationConfig(observer="minmax"), WeightConfig(per_channel=False))
    assert mapping.lookup(LayerId("anything", "Linear")) == base
    assert mapping.lookup(LayerId("fc", "Conv2d")) is None
    assert mapping.lookup(LayerId("fc.inner", "Linear")) is None
    assert mapping.lookup(LayerId("layer2", "Conv2d")) == QConfig(base.activation, WeightConfig(bits=4))
    assert mapping.lookup(LayerId("layer22", "Conv2d")) == QConfig(base.activation, WeightConfig(bits=2))
    assert mapping.lookup(LayerId("conv", "Conv2d")) == QConfig(ActivationConfig(observer="histogram"), base.weight)
    assert mapping.lookup(LayerId("layer1.conv", "Conv2d")) == QConfig(
        ActivationConfig(observer="moving_average"), base.weight
    )


def test_every_setting_of_a_qconfig_can_be_written_in_a_recipe() -> None:
    everything = {
        "bits": 7,
        "observer": "percentile",
        "learned": True,
        "symmetric": True,
        "signed": True,
        "observer_args": {"percentile": 99.9},
    }
    weights = {"bits": 7, "per_channel": False, "observer": "mse", "learned": True, "observer_args": {"eps": 1e-6}}
    assert set(everything) == {field.name for field in dataclasses.fields(ActivationConfig)}
    assert set(weights) == {field.name for field in dataclasses.fields(WeightConfig)}
    activation = ActivationConfig(7, "percentile", True, True, True, {"percentile": 99.9})
    section = QuantizeSection.model_validate(
        {
            "activations": {"observer": "mse"},
            "output": {"observer": "minmax"},
            "overrides": [
                {"regex": "body", "type": "add", "index": 1, "output": everything},
                {"type": "add", "activations": everything, "weights": weights},
            ],
        }
    )
    mapping = build_mapping(section)
    base = QConfig(ActivationConfig(observer="mse"), output=ActivationConfig(observer="minmax"))
    assert mapping.lookup(LayerId("fc", "Linear", "linear")) == base
    assert mapping.lookup(LayerId("body", "Body", "add", 1)) == QConfig(base.activation, output=activation)
    expected = QConfig(activation, WeightConfig(7, False, "mse", True, {"eps": 1e-6}), base.output)
    assert mapping.lookup(LayerId("body", "Body", "add", 0)) == expected


def test_settings_that_are_not_available_are_refused() -> None:
    with pytest.raises(PlanError, match=r"found the regex '\(', which is not one"):
        build_mapping(QuantizeSection.model_validate({"overrides": [{"regex": "(", "quantize": False}]}))


def test_fusions_are_lists_of_names_and_patterns_of_the_model_s_own_file(code: Path) -> None:
    model = build_model(of(f"{code}:gated"), seed=0)
    section = QuantizeSection(fusions=[["0.fc"], f"{code}:gate"])
    fusions = build_fusions(section)
    assert fusions[0] == ["0.fc"]
    assert isinstance(fusions[1], FusionPattern)
    planned = plan(model, torch.zeros(2, 2), fusions=fusions)
    assert [row.kind for row in planned.rows() if row.group == "0 (gate)"] == ["linear", "lookup", "mul"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("absent", "found nothing as "),
        ("number", "found int as "),
    ],
)
def test_what_is_no_pattern_is_refused(code: Path, name: str, words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        build_fusions(QuantizeSection(fusions=[f"{code}:{name}"]))
    assert str(caught.value) == f"quantize.fusions: {words}{code}:{name}, wanted a FusionPattern"
    with pytest.raises(ModelError, match="quantize.fusions: cannot import no.such.module"):
        build_fusions(QuantizeSection(fusions=["no.such.module:pattern"]))
