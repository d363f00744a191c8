"""The command `edgeqat sensitivity`: what it writes, and how it shares a directory with a run."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

import edgeqat as eq
from edgeqat.analysis import _samples
from edgeqat.data.dataset import Dataset, Split
from edgeqat.recipe import load_recipe
from edgeqat.reporting.monitor import Silent
from edgeqat.zoo import edge_model
from helpers import CommandLine, digests

pytestmark = pytest.mark.usefixtures("few_rounds")

TINY = [
    "--set=data.image_size=8",
    "--set=data.batch_size=16",
    "--set=data.calibration_n=900",  # leaves 178 images to train on
    "--set=train.float_epochs=1",
    "--set=train.qat_epochs=1",
    "--set=gate={max_drop: null, min_size_ratio: null, min_agreement: null}",
]


def test_before_a_run_and_after_it(command: CommandLine, tmp_path: Path) -> None:
    """It trains the float model once; the run goes on from there; afterwards it takes the weights of the run."""
    out = tmp_path / "out"
    args = ["digits-edge", *TINY, "-o", out]
    before = command("sensitivity", *args, "--n", "40")
    assert before.code == 0, before.err
    assert "train the float model, 1 epochs" in before.err
    assert before.out.startswith("40 samples")
    assert max(map(len, before.out.splitlines()[:-1])) <= 80
    assert before.out.splitlines()[-1] == f"figure: {out / 'sensitivity.svg'}"
    written = json.loads((out / "sensitivity.json").read_text())
    assert (written["n"], written["metric"], written["source"]) == (40, "top1", "digits")
    assert (out / "sensitivity.svg").read_bytes().lstrip().startswith(b"<?xml")
    assert not (out / "report.json").exists()

    ran = command("run", *args, "--resume")
    assert ran.code == 0, ran.err
    assert "float: done before, taken from its checkpoint" in ran.err
    assert (out / "sensitivity.json").exists()

    finished = digests(out)
    after = command("sensitivity", *args, "--n", "40", "--json")
    assert after.code == 0, after.err
    assert "train the float model" not in after.err
    assert digests(out) == finished  # its own files too: the weights are the same, and so is all that follows
    assert json.loads(after.out).items() <= written.items()

    other = command("sensitivity", *args, "--set=train.seed=1")
    assert "holds a run of another recipe: train.seed is 0 there, 1 here" in other.refusal(2)
    assert digests(out) == finished


def test_jobs_write_the_same_table_and_nothing_is_looked_at_twice(command: CommandLine, tmp_path: Path) -> None:
    args = ["digits-edge", *TINY, "--n", "40", "--json"]
    alone = command("sensitivity", *args, "-o", tmp_path / "alone")
    jobs = command("sensitivity", *args, "-o", tmp_path / "jobs", "--set=compute.jobs=2")
    assert (alone.code, jobs.code) == (0, 0), jobs.err
    assert "2 jobs at a time on processes, 1 thread each" in jobs.err
    assert jobs.out == alone.out
    for name in ("sensitivity.json", "sensitivity.svg"):
        assert (tmp_path / "jobs" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
    lines = [(tmp_path / name / "sensitivity.jsonl").read_text().splitlines() for name in ("jobs", "alone")]
    assert sorted(lines[0]) == sorted(lines[1])
    again = command("sensitivity", *args, "-o", tmp_path / "jobs")
    assert again.out == alone.out
    assert (tmp_path / "jobs" / "sensitivity.jsonl").read_text().splitlines() == lines[0]


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="ray is installed")
@pytest.mark.parametrize("words", [["sensitivity"], ["run", "--auto"]], ids=["sensitivity", "auto"])
def test_what_is_not_installed_is_said_before_data_is_loaded(
    command: CommandLine, tmp_path: Path, words: list[str]
) -> None:
    compute = ["--set=compute.jobs=2", "--set=compute.jobs_on=ray", "--set=data.source=nowhere"]
    ended = command(*words, "digits-edge", *TINY, *compute, "-o", tmp_path / "out")
    assert "pip install 'edgeqat[ray]'" in ended.refusal(4)
    assert not (tmp_path / "out").exists()


class StopAfterFloat(Silent):
    """Interrupts a run once it has its float weights."""

    def stage(self, text: str) -> None:
        if text.startswith("quantize after training"):
            raise KeyboardInterrupt


def test_a_run_and_an_analysis_train_the_same_float_model(command: CommandLine, tmp_path: Path) -> None:
    assert command("sensitivity", "digits-edge", *TINY, "-o", tmp_path / "one", "--n", "8").code == 0
    recipe = load_recipe("digits-edge", [setting.removeprefix("--set=") for setting in TINY])
    with pytest.raises(KeyboardInterrupt):
        eq.run(recipe, tmp_path / "other", monitor=StopAfterFloat())
    name = "checkpoints/float.safetensors"
    assert digests(tmp_path / "one")[name] == digests(tmp_path / "other")[name]


def test_without_labels(command: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "unlabelled.py").write_text(
        "import torch\n"
        "def make():\n"
        "    generator = torch.Generator().manual_seed(0)\n"
        "    images = torch.randint(0, 256, (60, 3, 8, 8), generator=generator, dtype=torch.uint8)\n"
        "    return {'train': (images[:40], None), 'test': (images[40:], None)}\n"
    )
    args = ["--set=train=null", "--set=task.metric=agreement", f"--set=data.source={tmp_path / 'unlabelled.py'}:make"]
    safetensors.torch.save_file(edge_model(num_classes=10).state_dict(), tmp_path / "edge.safetensors")
    args += [f"--set=model.weights={tmp_path / 'edge.safetensors'}"]
    args += ["--set=data.calibration_n=30", "--set=export=[onnxruntime]", TINY[-1]]
    ended = command("sensitivity", "digits-edge", *args, "-o", tmp_path / "out", "--json")
    assert ended.code == 0, ended.err
    table = json.loads(ended.out)
    assert (table["n"], table["metric"], table["float_metric"]) == (30, None, None)
    assert table["quantized"]["kl"]["value"] > 0


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--n", "1"], "Invalid value for '--n'"),
        (["--set=task.metric=f1"], "task.metric"),
        (["--set=task.metric=agreement"], "agreement needs train: null"),
    ],
    ids=["too few samples", "metric", "agreement"],
)
def test_bad_input_is_one_line_and_writes_nothing(
    command: CommandLine, tmp_path: Path, args: list[str], words: str
) -> None:
    ended = command("sensitivity", "digits-edge", *TINY, *args, "-o", tmp_path / "out")
    assert words in ended.refusal(2)
    assert not (tmp_path / "out").exists()


def test_interrupted_it_says_that_weights_are_kept(
    command: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("edgeqat.analysis.sensitivity", interrupt)
    out = tmp_path / "out"
    ended = command("sensitivity", "digits-edge", *TINY, "-o", out)
    assert ended.code == 130
    assert ended.err.splitlines()[-1] == (
        f"interrupted: float weights trained so far are kept in {out}; the same command goes on from there"
    )
    assert (out / "checkpoints" / "float.safetensors").exists()
    assert not (out / "sensitivity.json").exists()


def test_samples_are_of_validation_then_of_calibration() -> None:
    def split(start: int, n: int) -> Split:
        numbers = torch.arange(start, start + n)
        return Split((numbers.float()[:, None],), numbers)

    data = Dataset("here", split(0, 9), split(10, 5), split(20, 3), split(30, 9), None, None, None)
    assert _samples(data, 2).targets.tolist() == [20, 21]
    assert _samples(data, 5).targets.tolist() == [20, 21, 22, 10, 11]
    assert _samples(data, 99).targets.tolist() == [20, 21, 22, 10, 11, 12, 13, 14]
