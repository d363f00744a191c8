"""A run that was stopped and resumed ends with the bytes of one that was not; and what stands in the way is said."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
import torch

import edgeqat as eq
from edgeqat.errors import CheckpointError, OutputError, RecipeError, TrainingError
from edgeqat.recipe import Recipe, load_recipe
from edgeqat.reporting.monitor import Silent
from helpers import ENVIRONMENT, MAIN, digests, flip_byte

SETTINGS = [
    "data.image_size=8",
    "data.calibration_n=900",  # leaves 178 images to train on
    "data.batch_size=32",
    "train.float_epochs=2",
    "train.qat_epochs=2",
    "export=[onnxruntime, torchscript]",
    "gate={max_drop: null, min_size_ratio: null, min_agreement: null}",
]


pytestmark = pytest.mark.usefixtures("few_rounds")


def recipe(*more: str) -> Recipe:
    return load_recipe("digits-edge", [*SETTINGS, *more])


def kept(folder: Path) -> dict[str, str]:
    """Hashes of all that must be equal: model files, golden vectors, manifests, the weights of every stage."""
    hashes = digests(folder)
    return {
        name: value
        for name, value in hashes.items()
        if name.startswith("artifacts/") or (name.startswith("checkpoints/") and name.endswith(".safetensors"))
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What an uninterrupted run ends with."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    eq.run(recipe(), folder)
    return kept(folder)


class StopAt(Silent):
    """Interrupts, as Ctrl-C does, once a line or stage begins with some words, or after so many steps of one."""

    def __init__(self, words: str, steps: int | None = None) -> None:
        self._words, self._steps, self._armed = words, steps, False
        self.told: list[str] = []

    def stage(self, text: str) -> None:
        self.line(text)

    def line(self, text: str) -> None:
        self.told.append(text)
        if text.startswith(self._words):
            if self._steps is None:
                raise KeyboardInterrupt
            self._armed = True

    def steps(self, text: str, total: int) -> AbstractContextManager[Callable[..., None]]:
        @contextmanager
        def counted() -> Iterator[Callable[..., None]]:
            yield self._count

        return counted()

    def _count(self, told: str = "") -> None:
        if self._armed and self._steps is not None:
            self._steps -= 1
            if self._steps < 0:
                raise KeyboardInterrupt


def test_stopped_in_every_stage_and_resumed_each_time(whole: dict[str, str], tmp_path: Path) -> None:
    """One run, stopped again and again: in the middle of an epoch, between epochs, after each stage."""
    folder = tmp_path / "run"
    stops = [
        StopAt("train the float model", steps=2),
        StopAt("train the float model", steps=8),
        StopAt("epoch 2/2"),
        StopAt("quantize after training"),
        StopAt("fine-tune the float twin", steps=7),
        StopAt("quantization-aware training", steps=3),
        StopAt("quantization-aware training", steps=9),
        StopAt("lower"),
        StopAt("ptq, onnxruntime: 100"),
        StopAt("measure"),
    ]
    for stop in stops:
        with pytest.raises(KeyboardInterrupt):
            eq.run(recipe(), folder, resume=True, monitor=stop)
        assert not (folder / "report.json").exists()
    told = StopAt("never")
    report = eq.run(recipe(), folder, resume=True, monitor=told)
    assert [line for line in told.told if "done before" in line] == [
        f"{stage}: done before, taken from its checkpoint" for stage in ("float", "ptq", "float_finetuned", "qat")
    ]
    assert kept(folder) == whole
    assert len(report.results) == 12


def test_what_another_stage_drew_changes_nothing(whole: dict[str, str], tmp_path: Path) -> None:
    """A resumed process has drawn other random numbers before a stage than the first one had."""
    with pytest.raises(KeyboardInterrupt):
        eq.run(recipe(), tmp_path / "run", monitor=StopAt("quantization-aware training"))
    torch.manual_seed(12345)
    torch.rand(77)
    eq.run(recipe(), tmp_path / "run", resume=True)
    assert kept(tmp_path / "run") == whole


@pytest.mark.parametrize("part", ["json", "safetensors"])
def test_a_damaged_epoch_is_passed_over(whole: dict[str, str], tmp_path: Path, part: str) -> None:
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        eq.run(recipe(), folder, monitor=StopAt("quantization-aware training", steps=7))
    (damaged,) = (folder / "checkpoints" / "epochs").glob(f"qat-*.{part}")
    flip_byte(damaged, at=20)
    told = StopAt("never")
    eq.run(recipe(), folder, resume=True, monitor=told)
    assert any("is passed over" in line and str(damaged.with_suffix(".json")) in line for line in told.told)
    assert kept(folder) == whole


def test_damaged_final_weights_are_made_again(whole: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        eq.run(recipe(), folder, monitor=StopAt("lower"))
    for stage in ("float", "ptq", "qat"):
        path = folder / "checkpoints" / f"{stage}.safetensors"
        path.write_bytes(path.read_bytes()[:100])
    eq.run(recipe(), folder, resume=True)
    assert kept(folder) == whole


def test_another_recipe_is_named_and_nothing_changes(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        eq.run(recipe(), folder, monitor=StopAt("epoch 1/2"))
    before = digests(folder)
    with pytest.raises(
        RecipeError, match=r"holds a run of another recipe: train.float_lr is [\d.]+ there, 0.125 here"
    ):
        eq.run(recipe("train.float_lr=0.125"), folder, resume=True)
    assert digests(folder) == before


MODEL = """
from torch import nn

def make(num_classes):
    return nn.Sequential(nn.Conv2d(3, {channels}, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear({channels}, 10))
"""


def test_a_model_whose_code_changed_is_refused(tmp_path: Path) -> None:
    code, folder = tmp_path / "mine.py", tmp_path / "run"
    own = recipe(f"model.factory={code}:make")
    code.write_text(MODEL.format(channels=4), encoding="utf-8")
    with pytest.raises(KeyboardInterrupt):
        eq.run(own, folder, monitor=StopAt("quantize after training"))
    before = digests(folder)
    code.write_text(MODEL.format(channels=5), encoding="utf-8")
    with pytest.raises(CheckpointError, match="made with another plan: the model's code has changed since"):
        eq.run(own, folder, resume=True)
    assert digests(folder) == before


def test_resuming_nothing_begins_at_the_beginning(whole: dict[str, str], tmp_path: Path) -> None:
    eq.run(recipe(), tmp_path / "new", resume=True)
    assert kept(tmp_path / "new") == whole


def test_a_second_run_into_the_same_directory_is_refused(tmp_path: Path) -> None:
    """While another process trains there; and once that process was killed, its run can be resumed."""
    folder = tmp_path / "run"
    words = ["run", "digits-edge", *(f"--set={setting}" for setting in SETTINGS), "-o", str(folder)]
    process = subprocess.Popen([sys.executable, "-c", MAIN, *words], env=ENVIRONMENT, stdout=-1, stderr=-1, text=True)
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if "epoch 1/" in line:
                break
        for arguments in ({}, {"overwrite": True}, {"resume": True}):
            with pytest.raises(OutputError, match="another process is writing a run into"):
                eq.run(recipe(), folder, **arguments)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert eq.run(recipe(), folder, resume=True).results


LIMITED = f"""
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))  # a checkpoint is larger: the system refuses the write
{MAIN}
"""


def test_a_disk_without_room_is_one_line_and_the_run_can_be_resumed(whole: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = ["run", "digits-edge", *(f"--set={setting}" for setting in SETTINGS), "-o", str(folder)]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    done = subprocess.run([sys.executable, "-c", LIMITED, *words], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: cannot write ")
    assert "free space" in done.stderr.splitlines()[-1]
    assert not [path for path in folder.rglob(".*") if path.is_file()]
    assert (folder / "recipe.yaml").exists()
    eq.run(recipe(), folder, resume=True)
    assert kept(folder) == whole


class Acting(Silent):
    """Does something once, after a line or stage that begins with some words."""

    def __init__(self, words: str, act: Callable[[], object]) -> None:
        self._words, self._act, self._done = words, act, False

    def stage(self, text: str) -> None:
        self.line(text)

    def line(self, text: str) -> None:
        if text.startswith(self._words) and not self._done:
            self._done = True
            self._act()


@pytest.mark.parametrize("when", ["epoch 1/2", "quantize after training", "fine-tune the float twin"])
def test_a_directory_that_vanishes_is_one_line_and_is_not_made_again(
    whole: dict[str, str], tmp_path: Path, when: str
) -> None:
    folder, away = tmp_path / "run", tmp_path / "away"
    with pytest.raises(OutputError, match=rf"^{folder}\S* is gone, in the midst of a run; put it back and resume"):
        eq.run(recipe(), folder, monitor=Acting(when, lambda: folder.rename(away)))
    assert not folder.exists()
    if when == "epoch 1/2":
        away.rename(folder)
        eq.run(recipe(), folder, resume=True)
        assert kept(folder) == whole


@pytest.mark.skipif(not Path("/sys/kernel").is_dir(), reason="no file system here refuses what root writes")
def test_a_directory_that_can_no_longer_be_written_is_one_line(whole: dict[str, str], tmp_path: Path) -> None:
    epochs = tmp_path / "run" / "checkpoints" / "epochs"

    def refuse() -> None:
        epochs.rename(tmp_path / "away")
        epochs.symlink_to("/sys/kernel")

    with pytest.raises(OutputError, match=r"^cannot write .*; choose another place or free space$") as caught:
        eq.run(recipe(), tmp_path / "run", monitor=Acting("epoch 1/2", refuse))
    assert "\n" not in str(caught.value)
    epochs.unlink()
    (tmp_path / "away").rename(epochs)
    eq.run(recipe(), tmp_path / "run", resume=True)
    assert kept(tmp_path / "run") == whole


def test_a_training_that_diverges_names_where_and_what_is_kept(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(TrainingError) as caught:
        eq.run(recipe("train.qat_lr=1.0e+30"), folder)
    message = str(caught.value)
    assert "epoch 1, step " in message
    assert "lower the learning rate" in message
    assert "(stage float_finetuned; there is no checkpoint yet)" in message
    assert (folder / "checkpoints" / "float.safetensors").exists()
