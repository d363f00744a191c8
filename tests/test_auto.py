"""`run --auto`, from the command line on digits: each way in which it ends, and that it can be stopped anywhere."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import edgeqat as eq
from edgeqat.auto import run_auto
from edgeqat.recipe import Recipe, load_recipe
from edgeqat.reporting.monitor import Silent
from edgeqat.reporting.schema import Report, read_report
from helpers import CommandLine

SETTINGS = [
    "data.image_size=8",
    "data.calibration_n=128",
    "data.augment=null",
    "train.float_epochs=4",
    "train.qat_epochs=1",
    "export=[torchscript]",  # whose float twins are quickest to make
]
FAULT = (
    "quantize.overrides=[{module: entry_block.0, "
    "activations: {observer: percentile, observer_args: {percentile: 50.5}}}]"
)
"""A range that leaves almost nothing of a layer's output."""


pytestmark = pytest.mark.usefixtures("few_rounds")


def recipe(*more: str) -> Recipe:
    return load_recipe("digits-edge", [*SETTINGS, *more])


def gate(**limits: float) -> str:
    """A gate of these limits alone."""
    return f"gate={json.dumps({'min_size_ratio': None, 'min_agreement': None, 'max_drop': None, **limits})}"


def figures(report: Report) -> list[Any]:
    """What must be the same in a run that is made again: all but times."""
    return [(row.variant, row.runtime, row.metric, row.drop, row.file_bytes, row.sha256) for row in report.results]


def test_ptq_is_enough(command: CommandLine, tmp_path: Path) -> None:
    words = [f"--set={setting}" for setting in [*SETTINGS, gate(max_drop=0.05, min_agreement=0.998)]]
    ended = command("run", "digits-edge", "--auto", *words, "-o", tmp_path / "run")
    assert ended.code == 0
    assert "auto: PTQ is enough" in ended.out
    assert f"recipe: {tmp_path / 'run' / 'recipe.auto.yaml'}" in ended.out
    report = read_report(tmp_path / "run")
    assert report.auto is not None
    assert (report.auto.looks_at_test, report.auto.trials, len(report.auto.steps)) == (1, 0, 1)
    assert {row.variant for row in report.results} == {"float", "ptq"}
    assert {check.variant for check in report.gate.checks} == {"ptq"}
    assert not (tmp_path / "run" / "search").exists()
    assert "PTQ is enough" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def mended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose fault the search mends; read only."""
    folder = tmp_path_factory.mktemp("mended") / "run"
    run_auto(recipe(FAULT, gate(max_drop=0.05)), folder)
    return folder


def test_a_search_mends_a_planted_fault_without_training(mended: Path) -> None:
    report = read_report(mended)
    assert report.gate.passed
    assert report.auto is not None
    assert report.auto.conclusion == "PTQ is enough with another plan: entry_block.0 mse"
    assert [step.test for step in report.auto.steps] == [True, False, True]
    assert [step.folder for step in report.auto.steps] == ["steps/1-ptq", None, "steps/2-search"]
    assert report.auto.looks_at_test == 2
    trials = [json.loads(line) for line in (mended / "search" / "trials.jsonl").read_text().splitlines()]
    assert sum(line["kind"] == "trial" for line in trials) == report.auto.trials
    assert json.loads((mended / "search" / "sensitivity.json").read_text())["rows"]
    (override,) = load_recipe(str(mended / "recipe.auto.yaml")).quantize.overrides
    assert override.module == "entry_block.0"
    assert override.quantize
    assert load_recipe(str(mended / "recipe.yaml")) == recipe(FAULT, gate(max_drop=0.05))
    for row in report.results:
        assert row.artifact is None or (mended / row.artifact).is_file()


def test_the_recipe_found_gives_the_same_figures_in_a_plain_run(mended: Path, tmp_path: Path) -> None:
    found = read_report(mended)
    assert load_recipe(str(mended / "recipe.auto.yaml")).model_dump() == found.recipe
    moved = Path(shutil.copytree(mended, tmp_path / "moved"))
    assert figures(eq.run(str(moved / "recipe.auto.yaml"), tmp_path / "again")) == figures(found)


def test_trials_in_jobs_find_the_same_recipe(mended: Path, tmp_path: Path) -> None:
    told = StopAt("never")
    report = run_auto(recipe(FAULT, gate(max_drop=0.05), "compute.jobs=2"), tmp_path / "run", monitor=told)
    assert "2 jobs at a time on processes, 1 thread each" in told.told
    assert figures(report) == figures(read_report(mended))
    assert report.auto == read_report(mended).auto
    found, wanted = (load_recipe(str(folder / "recipe.auto.yaml")) for folder in (tmp_path / "run", mended))
    assert (found.quantize, found.train) == (wanted.quantize, wanted.train)
    tables = [(folder / "search" / "sensitivity.json").read_bytes() for folder in (tmp_path / "run", mended)]
    assert tables[0] == tables[1]


class StopAt(Silent):
    """Interrupts, as Ctrl-C does, when a stage or line begins with some words for the n-th time."""

    def __init__(self, words: str, n: int = 1) -> None:
        self._words, self._left = words, n
        self.told: list[str] = []

    def stage(self, text: str) -> None:
        self.line(text)

    def line(self, text: str) -> None:
        self.told.append(text)
        if text.startswith(self._words):
            self._left -= 1
            if self._left == 0:
                raise KeyboardInterrupt


def test_stopped_again_and_again_and_resumed(mended: Path, tmp_path: Path) -> None:
    folder, own = tmp_path / "run", recipe(FAULT, gate(max_drop=0.05))
    stops = [
        StopAt("epoch 2/4"),
        StopAt("measure"),
        StopAt("mse: drop "),
        StopAt("verify"),
        StopAt("auto: PTQ is enough"),
    ]
    for stop in stops:
        with pytest.raises(KeyboardInterrupt):
            run_auto(own, folder, resume=True, monitor=stop)
        assert not (folder / "report.json").exists()
    report = run_auto(own, folder, resume=True)
    found = read_report(mended)
    assert figures(report) == figures(found)
    assert report.auto == found.auto
    assert (folder / "recipe.auto.yaml").read_text() == (mended / "recipe.auto.yaml").read_text()
    lines = [json.loads(line) for line in (folder / "search" / "trials.jsonl").read_text().splitlines()]
    assert len({line["key"] for line in lines}) == len(lines)
    stages = StopAt("never")
    assert run_auto(own, folder, resume=True, monitor=stages) == report
    assert stages.told == [f"the run in {folder} is finished"]


def test_qat_is_tried_where_no_plan_is_enough_and_the_nearest_is_told(command: CommandLine, tmp_path: Path) -> None:
    """No plan gains half of the samples, and training does not either."""
    words = [f"--set={setting}" for setting in [*SETTINGS, gate(max_drop=-0.5)]]
    ended = command("run", "digits-edge", "--auto", *words, "-o", tmp_path / "run")
    assert ended.code == 3
    assert "auto: nothing passes the gate; the search: not even float for all layers" in ended.out
    report = read_report(tmp_path / "run")
    assert report.auto is not None
    whats = [step.what.split(",")[0] for step in report.auto.steps]
    assert whats[:3] == ["PTQ", "search", "QAT"]
    assert report.auto.looks_at_test == len(whats) - 1
    best = next(step for step in report.auto.steps if step.what in report.auto.conclusion)
    assert best.drop == min(step.drop for step in report.auto.steps if step.test and step.drop is not None)
    twins = [*tmp_path.rglob("float_finetuned.safetensors")]
    assert len({twin.read_bytes() for twin in twins}) == 1


def test_what_training_cannot_change_is_not_trained(tmp_path: Path) -> None:
    report = run_auto(recipe(gate(min_size_ratio=50.0)), tmp_path / "run")
    assert report.auto is not None
    assert [step.what.split(",")[0] for step in report.auto.steps] == ["PTQ", "search"]
    assert "no plan is 50 times smaller than float" in report.auto.conclusion
    assert not report.gate.passed


def test_a_recipe_without_training_is_searched_too(mended: Path, tmp_path: Path) -> None:
    weights = mended / "checkpoints" / "float.safetensors"
    own = recipe("train=null", f"model.weights={weights}", FAULT, gate(max_drop=0.05))
    report = run_auto(own, tmp_path / "run")
    assert report.auto is not None
    assert report.auto.conclusion.startswith("PTQ is enough with another plan: ")
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert load_recipe(str(tmp_path / "run" / "recipe.auto.yaml")).model == own.model
