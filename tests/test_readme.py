"""What the README shows is executed."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch

from edgeqat.factory import build_loss, build_metric
from edgeqat.train.losses import check_loss
from helpers import run_edgeqat, run_python

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_python_example_runs_as_it_stands(tmp_path: Path) -> None:
    ended = run_python(blocks("python")[0], cwd=tmp_path)
    assert ended.code == 0, ended.err
    assert "of the logits are bit-identical" in ended.out
    assert {p.name for p in (tmp_path / "resnet20-int8").iterdir()} == {
        "model.onnx",
        "manifest.json",
        "golden.safetensors",
        "verify.py",
    }


def test_the_data_example_can_be_inspected(tmp_path: Path) -> None:
    (tmp_path / "my_data.py").write_text(blocks("python")[1], encoding="utf-8")
    ended = run_edgeqat("inspect", "--set", "data.source=my_data.py:make", cwd=tmp_path)
    assert ended.code == 0, ended.err
    assert "ops in INT8" in ended.out


def test_the_task_example_fits_a_model_of_several_outputs(tmp_path: Path) -> None:
    (tmp_path / "my_task.py").write_text(blocks("python")[2], encoding="utf-8")
    loss, metric = build_loss(f"{tmp_path}/my_task.py:loss"), build_metric(f"{tmp_path}/my_task.py:box_error")
    outputs, targets = {"boxes": torch.ones(3, 4, requires_grad=True)}, {"boxes": torch.zeros(3, 4)}
    check_loss(loss, "loss", "boxes", outputs, targets)
    assert metric.statistics(outputs, targets).tolist() == [1, 1, 1]
    assert not metric.higher_is_better


def commands() -> list[str]:
    return re.findall(r"^edgeqat .+$", README, flags=re.MULTILINE)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("readme")


def test_the_commands_run_in_their_order(place: Path) -> None:
    """With the data set replaced by digits and one epoch each: the commands are the README's otherwise."""
    assert len(commands()) == 8
    for line in commands():
        words = shlex.split(line)[1:]
        if words[0] in ("run", "sensitivity"):
            words = [w.replace("path/to/cifar10", "digits") for w in words]
            for key in ("float_epochs", "qat_epochs"):
                words += ["--set", f"train.{key}=1"]
            words += ["--set", "data.calibration_n=64", "--set", "gate.max_drop=1.0"]
        ended = run_edgeqat(*words, cwd=place)
        assert ended.code == 0, (line, ended.err)
        assert ended.out.strip()


def test_the_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"(?:^|`)make (\w+)", README, flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


@pytest.mark.parametrize(
    "path", sorted(ROOT.glob("*.md")) + sorted((ROOT / "docs").glob("*.md")), ids=lambda p: p.name
)
def test_files_that_documents_name_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for name in re.findall(r"`((?:docs|benchmarks|tests)/[\w/.]+\.\w+)`", text):
        assert (ROOT / name).is_file(), name
