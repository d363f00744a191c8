"""The recipe for ImageNet, from end to end on a generated stand-in of its layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edgeqat.pipeline import run
from edgeqat.recipe import load_recipe
from edgeqat.reporting.schema import Report
from edgeqat.train.checkpoint import save_weights
from edgeqat.zoo import resnet8
from imagenet_stand_in import draw, write

CLASSES = 3
SETTINGS = [
    f"model.args={{num_classes: {CLASSES}, width: 0.1}}",
    "data.image_size=32",
    "data.batch_size=16",
    "data.calibration_n=8",
    "train.float_epochs=1",
    "train.qat_epochs=1",
    "train.freeze_batch_norm_after=0",
    "gate={max_drop: null, min_size_ratio: null, min_agreement: null}",
    "compute.workers=1",
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, few_rounds: None) -> tuple[Report, Path]:
    data, out = tmp_path_factory.mktemp("imagenet"), tmp_path_factory.mktemp("runs") / "out"
    for part, n in (("train", 16), ("val", 8)):
        write(data, part, draw(part, CLASSES, n, 48, 0), CLASSES, "folder")
    recipe = load_recipe("imagenet-mobilenetv2", [f"data.source={data}", *SETTINGS])
    return run(recipe, out), out


def test_the_recipe_runs_on_folders(finished: tuple[Report, Path]) -> None:
    report, _ = finished
    assert report.to_dict()["data"] | {"source": ""} == {"source": "", "train_n": 36, "calibration_n": 8, "eval_n": 24}
    assert [(row.variant, row.runtime) for row in report.results if row.artifact] == [
        (variant, "onnxruntime") for variant in ("float", "ptq", "float_finetuned", "qat")
    ]
    assert report.gate.passed


def test_a_device_is_told_of_the_centre_crop(finished: tuple[Report, Path]) -> None:
    _, out = finished
    manifest: dict[str, Any] = json.loads((out / "artifacts" / "qat" / "onnxruntime" / "manifest.json").read_text())
    assert manifest["preprocessing"]["resize"] == {"shorter_side": 37, "center_crop": [32, 32], "method": "bilinear"}
    assert manifest["preprocessing"]["labels"] == [f"n{label:08d}" for label in range(CLASSES)]


def test_a_finished_run_is_known_again(finished: tuple[Report, Path]) -> None:
    report, out = finished
    recipe = load_recipe(str(out / "recipe.yaml"))
    assert run(recipe, out, resume=True).to_dict() == report.to_dict()


def test_without_labels_images_are_judged_where_they_are(tmp_path: Path, few_rounds: None) -> None:
    write(tmp_path / "data", "any", draw("val", CLASSES, 8, 48, 0), CLASSES, "folder")
    settings = [setting for setting in SETTINGS if not setting.startswith(("train.", "model."))]
    save_weights(resnet8(3), tmp_path / "weights.safetensors")
    weights = f"weights: '{tmp_path / 'weights.safetensors'}'"
    settings += [f"model={{factory: 'edgeqat.zoo:resnet8', args: {{num_classes: 3}}, {weights}}}"]
    settings += [f"data.source={tmp_path / 'data'}", "train=null", "task.metric=agreement", "quantize.batch_norm=fold"]
    report = run(load_recipe("imagenet-mobilenetv2", settings), tmp_path / "out")
    assert [row.metric.n for row in report.results] == [16] * 4
