"""Runs and plans on data of every kind, from end to end; and that a refusal leaves nothing behind."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

import edgeqat as eq
from edgeqat.errors import RecipeError
from edgeqat.pipeline import load_data
from edgeqat.recipe import load_recipe
from edgeqat.replay.script import replay
from edgeqat.reporting.schema import Report
from edgeqat.zoo import edge_model, mobilenetv2_cifar
from helpers import EXACT_ARITHMETIC, CommandLine, run_edgeqat

pytestmark = pytest.mark.usefixtures("few_rounds")

CODE = """
import torch
from torch import nn

g = torch.Generator().manual_seed(0)

class Two(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.state, self.fc = nn.Conv2d(1, 4, 3), nn.Linear(3, 4), nn.Linear(8, 2)
    def forward(self, x, state):
        return self.fc(torch.cat([self.conv(x).relu().mean((2, 3)), self.state(state).relu()], 1))

def one_channel():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))

def rgb():
    torch.manual_seed(0)
    return nn.Conv2d(3, 4, 3)

def vectors():
    torch.manual_seed(0)  # as if they were loaded: these are quantized without training
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))

def grey(n=60):
    labels = torch.arange(n) % 2
    images = torch.randint(0, 100, (n, 1, 6, 5), generator=g, dtype=torch.uint8)
    return images + (labels * 100).to(torch.uint8)[:, None, None, None], labels

def labelled():
    return {"train": grey(), "test": grey(20), "labels": ["dark", "light"]}

def masks():
    return {part: (grey(40)[0], torch.zeros(40, 6, 5)) for part in ("train", "test")}

def two():
    part = lambda n: ({"x": grey(n)[0], "state": torch.randn(n, 3, generator=g)}, None)
    return {"train": part(20), "test": part(30)}

def unlabelled():
    return {"train": (torch.randn(20, 5, generator=g), None), "test": (torch.randn(30, 5, generator=g), None)}

def nan():
    return {"train": (torch.full((20, 5), float("nan")), None), "test": (torch.randn(30, 5), None)}

def fails():
    raise OSError("the disk is gone")
"""
PTQ = ["train=null", "task.metric=agreement", "data.calibration_n=16", "gate={max_drop: 1.0, min_agreement: 0.0}"]
PTQ += ["gate.min_size_ratio=null"]


@pytest.fixture
def code(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(CODE, encoding="utf-8")
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A flat folder of 40 PNG images."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for index, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (40, 12, 9, 3), dtype=np.uint8)):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        (folder / f"{index}.png").write_bytes(buffer.getvalue())
    return folder


def run_with(code: Path, folder: Path, source: str, factory: str, *settings: str) -> Report:
    chosen = [f"data.source={code}:{source}", f"model.factory={code}:{factory}", "model.args={}", "data.augment=null"]
    return eq.run(load_recipe("digits-edge", [*chosen, *settings]), folder)


def preprocessing(folder: Path, variant: str = "ptq") -> dict[str, object]:
    manifest = json.loads((folder / "artifacts" / variant / "onnxruntime" / "manifest.json").read_text())
    found: dict[str, object] = manifest["preprocessing"]
    return found


def assert_untrained(report: Report, folder: Path, n: int) -> None:
    """Float and ptq rows over n samples; the float model agrees with itself."""
    assert [row.variant for row in report.results] == ["float", "float", "ptq", "ptq"]
    for row in report.results:
        assert (row.metric.name, row.metric.n) == ("agreement", n)
    own = report.row("float", "simulation")
    assert own is not None
    assert own.metric.value == 1.0
    assert report.data["eval_n"] == n
    for variant in ("float", "ptq"):
        found = replay(folder / "artifacts" / variant / "onnxruntime")
        assert found.passed or not found.exact_here


# Runs.


def test_a_flat_folder_of_images_without_labels(command: CommandLine, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    save_file(edge_model(num_classes=10).state_dict(), tmp_path / "edge.safetensors")
    settings = [f"data.source={photos}", "data.image_size=16", f"model.weights={tmp_path / 'edge.safetensors'}", *PTQ]
    ended = command("run", "digits-edge", "-o", out, *(f"--set={setting}" for setting in settings))
    assert ended.code == 0, ended
    report = json.loads((out / "report.json").read_text())
    assert report["data"] == {"source": str(photos), "train_n": 0, "calibration_n": 16, "eval_n": 24}
    assert [row["metric"]["n"] for row in report["results"]] == [24] * 4
    assert report["results"][0]["metric"]["value"] == 1.0
    found = preprocessing(out)
    assert found["input"] == "RGB in 0..1"
    assert found["resize"] == {"size": [16, 16], "method": "bilinear"}
    assert found["labels"] is None


@EXACT_ARITHMETIC
def test_the_bundled_recipe_for_own_images_wants_trained_weights_alone(
    command: CommandLine, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a directory with a folder `images`; 128 of them calibrate."""
    images = tmp_path / "images"
    images.mkdir()
    for index in range(140):
        Image.open(photos / f"{index % 40}.png").rotate(index).save(images / f"{index}.png")
    monkeypatch.chdir(tmp_path)
    refused = command("run", "folder-ptq").refusal(2)
    assert (
        "model.weights is null and nothing is trained, so edgeqat.zoo:mobilenetv2_cifar has random weights" in refused
    )
    assert not (tmp_path / "runs").exists()
    save_file(mobilenetv2_cifar(num_classes=10, width=0.5).state_dict(), tmp_path / "mine.safetensors")
    ended = command("run", "folder-ptq", "--set", "model.weights=mine.safetensors")
    assert ended.code == 0, ended
    report = json.loads((tmp_path / "runs" / "folder-ptq" / "report.json").read_text())
    assert [(row["variant"], row["runtime"]) for row in report["results"]] == [
        (variant, runtime) for variant in ("float", "ptq") for runtime in ("simulation", "onnxruntime", "torchscript")
    ]
    for row in report["results"]:
        assert (row["metric"]["name"], row["metric"]["n"]) == ("agreement", 12)
        if row["variant"] == "ptq" and row["runtime"] != "simulation":
            assert row["parity"]["bit_identical"] == 1.0


@EXACT_ARITHMETIC
def test_the_agreement_of_an_artifact_is_that_of_its_own_outputs(code: Path, tmp_path: Path) -> None:
    """Counted here from the outputs of both artifacts, for which no label is known."""
    report = run_with(code, tmp_path / "run", "unlabelled", "vectors", *PTQ)
    assert_untrained(report, tmp_path / "run", 30)
    places = {
        name: eq.load_artifact(tmp_path / "run" / "artifacts" / name / "onnxruntime") for name in ("float", "ptq")
    }
    inputs = load_data(load_recipe(str(tmp_path / "run" / "recipe.yaml"))).test.inputs
    assert isinstance(inputs, Tensor)
    best = {name: artifact.run(inputs)[0].argmax(1) for name, artifact in places.items()}
    row = report.row("ptq", "onnxruntime")
    assert row is not None
    assert row.metric.value == pytest.approx(float((best["float"] == best["ptq"]).double().mean()))
    assert row.parity is not None
    assert row.parity.bit_identical == 1.0
    assert preprocessing(tmp_path / "run") == {
        "input": "float32 as given",
        "layout": None,
        "resize": None,
        "labels": None,
    }


def test_several_inputs(code: Path, tmp_path: Path) -> None:
    report = run_with(code, tmp_path / "run", "two", "Two", *PTQ)
    assert_untrained(report, tmp_path / "run", 30)
    inputs = preprocessing(tmp_path / "run")["inputs"]
    assert isinstance(inputs, dict)
    assert list(inputs) == ["x", "state"]
    assert inputs["x"]["input"] == "1 channel in 0..1"


def test_training_on_images_of_one_channel(code: Path, tmp_path: Path) -> None:
    settings = ["data.calibration_n=20", "data.augment=[flip]", "train.float_epochs=20", "train.qat_epochs=1"]
    report = run_with(code, tmp_path / "run", "labelled", "one_channel", *settings)
    row = report.row("qat", "onnxruntime")
    assert row is not None
    assert row.metric.n == 20
    assert preprocessing(tmp_path / "run", "qat")["labels"] == ["dark", "light"]
    assert preprocessing(tmp_path / "run", "qat")["resize"] is None


# Plans.


def test_inspect_takes_the_shape_from_a_callable_s_data(command: CommandLine, code: Path) -> None:
    chosen = [f"--set=data.source={code}:labelled", f"--set=model.factory={code}:one_channel", "--set=model.args={}"]
    ended = command("inspect", "digits-edge", "--set=data.calibration_n=20", "--json", *chosen)
    assert ended.code == 0, ended
    assert "conv" in ended.out


def test_inspect_needs_no_data_where_the_shape_is_known(command: CommandLine, tmp_path: Path) -> None:
    assert command("inspect", "digits-edge", f"--set=data.source={tmp_path}/nowhere").code == 0


# Refusals.


@pytest.mark.parametrize(
    ("source", "factory", "settings", "words"),
    [
        ("fails", "vectors", PTQ, "mine.py:fails failed: OSError: the disk is gone"),
        ("nan", "vectors", PTQ, "train: inputs: sample 0 holds NaN or infinity (20 in all)"),
        ("unlabelled", "vectors", [], "has no labels, which training and every metric but agreement need"),
        ("unlabelled", "vectors", ["train=null"], "has no labels, which training and every metric but agreement"),
        ("unlabelled", "vectors", [*PTQ, "data.calibration_n=21"], "has 20 samples; lower it"),
        ("unlabelled", "vectors", [*PTQ, "data.mean=[0.5]"], "data.mean is [0.5], but float32 inputs are used as"),
        ("unlabelled", "vectors", [*PTQ, "measure.batch=31"], "measure.batch is 31, but there are 30 test samples"),
        (
            "labelled",
            "one_channel",
            ["data.mean=[0.1, 0.2, 0.3]", "data.calibration_n=20"],
            "wanted 1 finite numbers, one per channel",
        ),
        ("labelled", "rgb", ["data.calibration_n=20"], "inputs float32 [2, 1, 6, 5]: RuntimeError: Given groups=1"),
        ("two", "one_channel", PTQ, "inputs['x'] float32 [2, 1, 6, 5], inputs['state'] float32 [2, 3]: TypeError"),
        ("masks", "one_channel", ["data.augment=[flip]", "data.calibration_n=9"], "targets that are no classes might"),
    ],
)
def test_bad_data_is_one_line_and_leaves_nothing(
    command: CommandLine, code: Path, tmp_path: Path, source: str, factory: str, settings: list[str], words: str
) -> None:
    chosen = [f"data.source={code}:{source}", f"model.factory={code}:{factory}", "model.args={}", "data.augment=null"]
    out = tmp_path / "run"
    ended = command("run", "digits-edge", "-o", out, *(f"--set={setting}" for setting in [*chosen, *settings]))
    assert words in ended.refusal(2)
    assert not out.exists()


def test_a_folder_without_labels_where_labels_are_needed(command: CommandLine, photos: Path, tmp_path: Path) -> None:
    ended = command("run", "digits-edge", f"--set=data.source={photos}", "-o", tmp_path / "run")
    assert "holds 40 images without labels, wanted one subfolder a class; only train: null with" in ended.refusal(2)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["no-such-set", "org/no-such-set"])
def test_the_hub_offline(tmp_path: Path, name: str) -> None:
    """The real library in its own process, where it is told before its import that there is no network."""
    found = run_edgeqat("run", "digits-edge", f"--set=data.source={name}", "-o", "run", cwd=tmp_path).refusal(2)
    assert f"the hub's {name} cannot be read (" in found
    assert f"; nor is there a folder {name}; give one that exists" in found
    assert list(tmp_path.iterdir()) == []


def test_agreement_is_refused_where_labels_are_learned(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="agreement needs train: null; to train, choose a metric of the labels"):
        eq.run(load_recipe("digits-edge", ["task.metric=agreement"]), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []
