"""Runs with metrics and losses of one's own, from end to end; and that what does not fit is refused first."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import edgeqat as eq
from edgeqat.metrics import METRICS
from edgeqat.pipeline import load_data
from edgeqat.recipe import load_recipe
from edgeqat.reporting.schema import Report, Row
from edgeqat.train.losses import LOSSES
from helpers import EXACT_ARITHMETIC, CommandLine

pytestmark = pytest.mark.usefixtures("few_rounds")

CODE = """
import torch
import torch.nn.functional as F
from torch import nn

g = torch.Generator().manual_seed(0)

class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.kind, self.size = nn.Linear(6, 16), nn.Linear(16, 3), nn.Linear(16, 1)
    def forward(self, x):
        x = self.body(x).relu()
        return {"kind": self.kind(x), "size": self.size(x)}

def heads():
    return Heads()

def regressor():
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 1))

def segmenter():
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 3, 1))

def classifier():
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))

def vectors(n):
    x = torch.randn(n, 6, generator=g)
    return x, x[:, :3].argmax(1), x.sum(1, keepdim=True)

def sizes():
    return {part: (lambda x, kind, size: (x, size))(*vectors(n)) for part, n in (("train", 200), ("test", 60))}

def both():
    return {
        part: (lambda x, kind, size: (x, {"kind": kind, "size": size}))(*vectors(n))
        for part, n in (("train", 200), ("test", 60))
    }

def kinds():
    found = {part: (lambda x, kind, size: (x, kind))(*vectors(n)) for part, n in (("train", 200), ("test", 60))}
    return found | {"labels": ["a", "b", "c"]}

def masks():
    def part(n):
        images = torch.randint(0, 256, (n, 3, 8, 8), generator=g, dtype=torch.uint8)
        targets = images.long().argmax(1)
        targets[:, 0] = 255
        return images, targets
    return {"train": part(80), "test": part(20), "labels": ["red", "green", "blue"]}

def one_test_sample():
    found = sizes()
    return {"train": found["train"], "test": tuple(t[:1] for t in found["test"])}

def joint(outputs, targets):
    return F.cross_entropy(outputs["kind"], targets["kind"]) + F.l1_loss(outputs["size"], targets["size"])

def joint_error(outputs, targets):
    wrong = outputs["kind"].argmax(1) != targets["kind"]
    return wrong.double() + (outputs["size"] - targets["size"]).abs().squeeze(1)
joint_error.higher_is_better = False

def pixels(outputs, targets):
    return F.cross_entropy(outputs, targets, ignore_index=255)

def detached(outputs, targets):
    return outputs.detach().mean()

def per_sample(outputs, targets):
    return outputs.abs().mean(1)

def number(outputs, targets):
    return 0.5

def raises(outputs, targets):
    raise ValueError("no such head")

def undecided(outputs, targets):
    return outputs[:, 0]

def scalar(outputs, targets):
    return outputs.mean()
scalar.higher_is_better = True

def nan(outputs, targets):
    return outputs[:, 0] * float("nan")
nan.higher_is_better = True

def broken(outputs, targets):
    return outputs.boxes
broken.higher_is_better = True
"""
SHORT = [
    "data.calibration_n=40",
    "data.augment=null",
    "model.args={}",
    "export=[onnxruntime]",
    "gate.min_size_ratio=null",
]
SHORT += ["train.float_epochs=15", "train.qat_epochs=2", "train.float_lr=0.02"]


@pytest.fixture
def code(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(CODE, encoding="utf-8")
    return path


def chosen(code: Path, source: str, factory: str, loss: str, metric: str) -> list[str]:
    built_in = {*LOSSES, *METRICS}
    loss, metric = (name if name in built_in else f"{code}:{name}" for name in (loss, metric))
    settings = [f"data.source={code}:{source}", f"model.factory={code}:{factory}", *SHORT]
    return [*settings, f"task.loss={loss}", f"task.metric={metric}"]


def rows_of(report: Report) -> tuple[Row, Row]:
    """(float_finetuned, qat) on the runtime."""
    twin, row = report.row("float_finetuned", "onnxruntime"), report.row("qat", "onnxruntime")
    assert twin is not None and row is not None
    assert row.drop is not None and row.drop_ci95 is not None and row.parity is not None
    assert row.drop_ci95[0] <= row.drop <= row.drop_ci95[1]
    return twin, row


@EXACT_ARITHMETIC
def test_a_regression_model_in_its_own_unit(code: Path, tmp_path: Path) -> None:
    settings = [*chosen(code, "sizes", "regressor", "mse", "mae"), "gate={max_drop: 0.5, min_agreement: 1.0}"]
    report = eq.run(load_recipe("digits-edge", settings), tmp_path / "run")
    twin, row = rows_of(report)
    assert (row.metric.name, row.metric.higher_is_better, row.metric.is_share, row.metric.n) == (
        "mae",
        False,
        False,
        60,
    )
    assert 0 < twin.metric.value < 1.0  # the mean absolute target is about 2
    assert row.drop == pytest.approx(row.metric.value - twin.metric.value)  # lower is better
    assert row.parity is not None and (row.parity.bit_identical, row.parity.agreement) == (1.0, 1.0)
    assert row.changes is not None and row.changes.flips is None and row.changes.per_class is None
    assert row.changes.largest is not None and len(row.changes.largest) == 50
    assert abs(row.changes.largest[0].drop) >= abs(row.changes.largest[-1].drop) > 0
    assert report.gate.passed
    page = (tmp_path / "run" / "report.html").read_text()
    assert "lower is better" in page and "in the unit of the metric" in page


@EXACT_ARITHMETIC
def test_a_dict_of_outputs_with_a_loss_and_a_metric_of_one_s_own(
    command: CommandLine, code: Path, tmp_path: Path
) -> None:
    """Through the command line; the figure is computed here again from the outputs of the shipped file."""
    out = tmp_path / "run"
    settings = [*chosen(code, "both", "heads", "joint", "joint_error"), "gate={max_drop: 0.5}"]
    ended = command("run", "digits-edge", "-o", out, *(f"--set={setting}" for setting in settings))
    assert ended.code == 0, ended
    assert "joint_error" in ended.out and "(lower is better)" in ended.out and "not measured:" in ended.out
    assert "validation joint_error " in ended.err and "%" not in ended.err.split("verify")[0]
    rows = json.loads((out / "report.json").read_text())["results"]
    row = next(r for r in rows if (r["variant"], r["runtime"]) == ("qat", "onnxruntime"))
    test = load_data(load_recipe(str(out / "recipe.yaml"))).test
    artifact = eq.load_artifact(out / "artifacts" / "qat" / "onnxruntime")
    kind, size = artifact.run(test.inputs)
    wrong = (kind.argmax(1) != test.targets["kind"]).double()
    figures = wrong + (size - test.targets["size"]).abs().squeeze(1)
    assert row["metric"]["value"] == pytest.approx(float(figures.mean()), abs=1e-6)
    assert row["metric"]["value"] < 1.0  # a model that learned neither head has 0.67 + 2


@EXACT_ARITHMETIC
def test_segmentation(code: Path, tmp_path: Path) -> None:
    settings = [
        *chosen(code, "masks", "segmenter", "pixels", "mean_iou"),
        "train.float_lr=0.2",
        "gate={max_drop: 0.2}",
    ]
    report = eq.run(load_recipe("digits-edge", settings), tmp_path / "run")
    twin, row = rows_of(report)
    assert twin.metric.value > 0.5  # the argmax of three random colours is 0.2 by chance
    assert row.drop == pytest.approx(twin.metric.value - row.metric.value)
    assert row.changes is not None and row.changes.per_class is not None
    assert [found.name for found in row.changes.per_class] == ["red", "green", "blue"]
    assert row.parity is not None and row.parity.agreement == 1.0


@EXACT_ARITHMETIC
def test_flips_and_classes_of_a_classifier_add_up(code: Path, tmp_path: Path) -> None:
    settings = [*chosen(code, "kinds", "classifier", "cross_entropy", "top1"), "quantize.weights.bits=2"]
    report = eq.run(load_recipe("digits-edge", settings), tmp_path / "run")
    for variant, twin in (("ptq", "float"), ("qat", "float_finetuned")):
        row, other = report.row(variant, "onnxruntime"), report.row(twin, "onnxruntime")
        assert row is not None and other is not None and row.changes is not None
        flips, classes = row.changes.flips, row.changes.per_class
        assert flips is not None and classes is not None
        assert flips.right_to_wrong - flips.wrong_to_right == round(60 * (other.metric.value - row.metric.value))
        assert sum(found.n for found in classes) == 60
        right = sum(found.n * found.quantized_value for found in classes if found.quantized_value is not None)
        assert right == pytest.approx(60 * row.metric.value)
    ptq = report.row("ptq", "onnxruntime")
    assert ptq is not None and ptq.changes is not None and ptq.changes.flips is not None
    assert ptq.changes.flips.samples, "two bits must hurt"


@pytest.mark.parametrize(
    ("source", "factory", "loss", "metric", "words"),
    [
        ("sizes", "regressor", "detached", "mae", "has no gradient: compute it from the outputs in torch"),
        ("sizes", "regressor", "per_sample", "mae", "returns float32 [40], wanted a 0-d tensor; take its mean"),
        ("sizes", "regressor", "number", "mae", "returns a float, wanted a 0-d tensor"),
        ("sizes", "regressor", "raises", "mae", "fails: ValueError: no such head"),
        ("sizes", "regressor", "missing", "mae", "has no callable 'missing'"),
        ("kinds", "regressor", "mse", "mae", "outputs are float32 [40, 1], targets int64 [40], wanted one shape"),
        ("both", "heads", "cross_entropy", "joint_error", "the loss cross_entropy of one batch"),
        ("both", "heads", "joint", "mae", "the model returns a dict, and the metric mae takes one tensor"),
        ("kinds", "classifier", "cross_entropy", "top5", "outputs are of 3 classes, wanted at least 5 for top5"),
        ("kinds", "classifier", "cross_entropy", "mean_iou", "wanted scores [N, C, H, W] for mean_iou"),
        ("sizes", "regressor", "mse", "top1", "targets are float32 [40, 1], wanted integers [40]"),
        (
            "sizes",
            "regressor",
            "mse",
            "undecided",
            "the metric undecided does not say which way is better",
        ),
        ("sizes", "regressor", "mse", "scalar", "the metric scalar returns float32 [], wanted a tensor [40]"),
        ("sizes", "regressor", "mse", "nan", "the metric nan is NaN or infinite for 40 of 40 samples"),
        ("sizes", "regressor", "mse", "broken", "the metric broken fails on a batch: AttributeError"),
        ("sizes", "regressor", "mse", "missing", "has no callable 'missing'"),
        (
            "one_test_sample",
            "regressor",
            "mse",
            "mae",
            "found 1 test samples, wanted at least 2: mae has no interval",
        ),
    ],
)
def test_what_does_not_fit_is_one_line_before_anything_is_trained(
    command: CommandLine, code: Path, tmp_path: Path, source: str, factory: str, loss: str, metric: str, words: str
) -> None:
    out = tmp_path / "run"
    settings = chosen(code, source, factory, loss, metric)
    ended = command("run", "digits-edge", "-o", out, *(f"--set={setting}" for setting in settings))
    assert words in ended.refusal(2)
    assert not out.exists()
