"""The aids of post-training quantization in a run: applied, reported, and there again when it is resumed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import edgeqat as eq
from edgeqat.errors import CheckpointError, RecipeError
from edgeqat.recipe import Recipe, load_recipe
from edgeqat.reporting.monitor import Silent
from edgeqat.reporting.schema import Report
from helpers import digests

SETTINGS = [
    "data.image_size=8",
    "data.calibration_n=900",  # leaves 178 images to train on
    "train.float_epochs=1",
    "train.qat_epochs=1",
    "quantize.weights.bits=3",
    "gate={max_drop: null, min_size_ratio: null, min_agreement: null}",
]
ALL = "quantize.ptq={equalize: true, adaround: {iterations: 40, positions: 4, learning_rate: 0.1}, correct_bias: true}"


pytestmark = pytest.mark.usefixtures("few_rounds")


def recipe(*more: str) -> Recipe:
    return load_recipe("digits-edge", [*SETTINGS, *more])


def kept(folder: Path) -> dict[str, str]:
    """Hashes of model files and of the weights of every stage."""
    found = digests(folder)
    return {name: value for name, value in found.items() if name.endswith((".safetensors", ".onnx", "aids.json"))}


class StopAt(Silent):
    """Interrupts once a stage or line begins with some words."""

    def __init__(self, words: str) -> None:
        self._words = words

    def stage(self, text: str) -> None:
        self.line(text)

    def line(self, text: str) -> None:
        if text.startswith(self._words):
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def weights(whole: tuple[Path, Report]) -> str:
    """The setting that begins with the float weights that it trained."""
    return f"model.weights={whole[0] / 'checkpoints' / 'float.safetensors'}"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    """A run with all aids."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, eq.run(recipe(ALL), folder)


def test_the_report_has_each_aid_before_and_after(whole: tuple[Path, Report]) -> None:
    folder, report = whole
    assert [row.aid for row in report.ptq_aids] == ["equalize", "adaround", "correct_bias"]
    for row, following in zip(report.ptq_aids, report.ptq_aids[1:], strict=False):
        assert row.after == following.before
    for row in report.ptq_aids:
        assert row.split == "validation" and row.n > 0 and row.after.metric is not None
        assert row.after.sqnr_db is not None and row.changed.endswith("layers")
    adaround = report.ptq_aids[1]
    assert adaround.before.sqnr_db is not None and adaround.after.sqnr_db is not None
    assert adaround.after.sqnr_db > adaround.before.sqnr_db
    assert json.loads((folder / "report.json").read_text())["ptq_aids"][0]["aid"] == "equalize"
    page = (folder / "report.html").read_text()
    assert "Aids of post-training quantization" in page and "<td>correct_bias</td>" in page and " dB</td>" in page


def test_stopped_and_resumed_it_ends_with_the_same_bytes_and_rows(whole: tuple[Path, Report], tmp_path: Path) -> None:
    """In the middle of the aids, behind them, and with what they made in its checkpoint alone."""
    folder, report = whole
    for words in ("adaround", "fine-tune", "quantization-aware"):
        with pytest.raises(KeyboardInterrupt):
            eq.run(recipe(ALL), tmp_path / "run", resume=True, monitor=StopAt(words))
    resumed = eq.run(recipe(ALL), tmp_path / "run", resume=True)
    assert kept(tmp_path / "run") == kept(folder)
    assert resumed.ptq_aids == report.ptq_aids


def test_training_starts_from_what_the_aids_ended_with(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        eq.run(recipe(ALL, "train.qat_epochs=0"), tmp_path / "run", monitor=StopAt("lower"))
    found = digests(tmp_path / "run" / "checkpoints")
    assert found["qat.safetensors"] == found["ptq.safetensors"]


def test_without_training_and_labels_they_are_judged_by_their_outputs(weights: str, tmp_path: Path) -> None:
    aids = "quantize.ptq={correct_bias: true}"
    report = eq.run(recipe(aids, weights, "train=null", "task.metric=agreement"), tmp_path / "run")
    (row,) = report.ptq_aids
    assert row.before.metric is None and row.before.sqnr_db is not None


def test_without_aids_there_are_no_rows(weights: str, tmp_path: Path) -> None:
    report = eq.run(recipe(weights, "train=null"), tmp_path / "run")
    assert report.ptq_aids == [] and not list((tmp_path / "run" / "checkpoints").glob("*aids*"))
    assert "Aids of post-training" not in (tmp_path / "run" / "report.html").read_text()


def test_a_damaged_file_of_rows_is_refused(weights: str, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        eq.run(recipe(ALL, weights, "train=null"), tmp_path / "run", monitor=StopAt("lower"))
    (tmp_path / "run" / "checkpoints" / "ptq-aids.json").write_text("[{")
    with pytest.raises(CheckpointError, match="ptq-aids.json cannot be read; restore it, or start afresh"):
        eq.run(recipe(ALL, weights, "train=null"), tmp_path / "run", resume=True)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("quantize.batch_norm=live", "ptq.equalize wants quantize.batch_norm: fold, found live"),
        ("quantize.ptq.adaround.iterations=0", "quantize.ptq.adaround.iterations: found 0"),
        ("quantize.ptq.adaround.strength=0.0", "quantize.ptq.adaround.strength: found 0.0"),
        ("quantize.ptq.adaround={iteration: 3}", "unknown key quantize.ptq.adaround.iteration; did you mean"),
        ("quantize.ptq.bias=true", "unknown key quantize.ptq.bias"),
    ],
)
def test_settings_that_do_not_fit(setting: str, words: str) -> None:
    with pytest.raises(RecipeError) as refused:
        recipe(ALL, setting)
    assert words in str(refused.value)
