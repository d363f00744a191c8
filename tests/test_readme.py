"""What the README shows is executed."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

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
