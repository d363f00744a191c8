"""Experiment tracking: event files and MLflow runs are read back; an epoch is logged once, whatever happens."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

import edgeqat as eq
from edgeqat.errors import CheckpointError, InputError
from edgeqat.recipe import LogSection, Recipe, load_recipe
from edgeqat.reporting.monitor import Silent
from edgeqat.tracking import Tracking, check_trackers, tracked
from helpers import run_python

PACKAGES = ("tensorboard", "mlflow")
TENSORBOARD = pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None, reason="wants tensorboard: pip install 'edgeqat[tensorboard]'"
)
MLFLOW = pytest.mark.skipif(
    importlib.util.find_spec("mlflow") is None, reason="wants mlflow: pip install 'edgeqat[mlflow]'"
)
TINY = [
    "data.image_size=8",
    "data.batch_size=64",
    "data.calibration_n=900",
    "train.float_epochs=3",
    "train.qat_epochs=1",
    "gate={}",
]


class StopAtError(Exception):
    """Ends a run where a test wants it to end."""


class StopAt(Silent):
    """A monitor that ends the run at a line."""

    def __init__(self, start: str) -> None:
        self._start = start

    def line(self, text: str) -> None:
        """Ends the run there."""
        if text.startswith(self._start):
            raise StopAtError


def tiny(**log: str) -> Recipe:
    return load_recipe("digits-edge", [*TINY, *(f"log.{key}={value}" for key, value in log.items())])


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Every (step, value) in the event files of a folder, as written: nothing is purged or sampled."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.util.tensor_util import make_ndarray

    found: dict[str, list[tuple[int, float]]] = {}
    for path in sorted(folder.glob("events.*")):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if value.metadata.plugin_data.plugin_name == "scalars":
                    read: Any = make_ndarray(value.tensor)
                    found.setdefault(value.tag, []).append((event.step, float(read)))
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_what_is_not_installed_is_said_before_anything_is_done(package: str, tmp_path: Path) -> None:
    code = (
        f"import sys; sys.modules[{package!r}] = None; sys.argv = ['edgeqat', 'run', *sys.argv[1:]]\n"
        "from edgeqat.cli import main\nmain()"
    )
    ended = run_python(code, f"--set=log.{package}={tmp_path / 'log'}", "-o", tmp_path / "out")
    message = ended.refusal(2)
    assert f"log.{package}: {package} cannot be imported" in message
    assert f"install it: pip install 'edgeqat[{package}]', or go without it: --set log.{package}=null" in message
    assert "load digits" not in ended.err
    assert not (tmp_path / "out").exists()


def test_nothing_is_logged_and_nothing_imported_by_default() -> None:
    assert load_recipe("digits-edge").log == LogSection(tensorboard=None, mlflow=None)
    check_trackers(LogSection())


def test_logging_has_no_part_in_what_a_recipe_means(tmp_path: Path) -> None:
    assert tiny(tensorboard=str(tmp_path)).sha256() == tiny(mlflow="http://host:5000").sha256() == tiny().sha256()
    assert "log" not in tiny().identity()


def test_a_folder_of_logs_is_relative_to_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("log: {tensorboard: tb, mlflow: 'sqlite:///ml.db'}\n")
    log = load_recipe(str(tmp_path / "r.yaml")).log
    assert (log.tensorboard, log.mlflow) == (str(tmp_path / "tb"), "sqlite:///ml.db")


def test_a_damaged_note_is_bad_input(tmp_path: Path) -> None:
    (tmp_path / "tracked.json").write_text('{"tensorboard": 3}')
    with pytest.raises(CheckpointError, match=r"tracked\.json cannot be read"):
        Tracking(tmp_path / "tracked.json")


@TENSORBOARD
def test_a_log_that_fails_can_be_gone_on_with(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    section = LogSection(tensorboard=str(tmp_path / "file"))
    with (
        tracked(section, tmp_path / "out") as tracking,
        pytest.raises(InputError, match=r"log\.tensorboard fails: .*--set log\.tensorboard=null"),
    ):
        tracking.epoch("float", 1, {"loss": 1.0})
    (tmp_path / "file").unlink()
    with tracked(section, tmp_path / "out") as tracking:
        tracking.epoch("float", 1, {"loss": 1.0})
    assert scalars(tmp_path / "file" / "float") == {"loss": [(1, 1.0)]}


@TENSORBOARD
@pytest.mark.usefixtures("few_rounds")
def test_a_stopped_and_resumed_run_logs_each_epoch_once(tmp_path: Path) -> None:
    logs, out = tmp_path / "tb", tmp_path / "out"
    recipe = tiny(tensorboard=str(logs))
    with pytest.raises(StopAtError):
        eq.run(tiny(), out, monitor=StopAt("epoch 1/3"))  # logging is switched on later
    with pytest.raises(StopAtError):
        eq.run(recipe, out, monitor=StopAt("epoch 2/3"), resume=True)  # kept, and not yet logged
    report = eq.run(recipe, out, resume=True)
    for stage, epochs in (("float", 3), ("float_finetuned", 1), ("qat", 1)):
        found = scalars(logs / stage)
        assert set(found) == {"loss", "lr", "top1"}
        assert all([step for step, _ in values] == list(range(1, epochs + 1)) for values in found.values())
    ptq = report.row("ptq", "onnxruntime")
    assert ptq is not None
    assert scalars(logs / "report")["ptq/onnxruntime/top1"] == [(0, pytest.approx(ptq.metric.value))]


@MLFLOW
def test_an_mlflow_run_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # a database wants sqlalchemy, which the slim client has not
    uri = str(tmp_path / "runs")
    out, section = tmp_path / "out", LogSection(mlflow=uri)
    for done in (1, 2):  # the second time is a resumed run, which tells of the first epoch again
        with tracked(section, out) as tracking:
            for index in range(1, done + 1):
                tracking.epoch("qat", index, {"loss": 1.0 / index, "my metric(%)": 0.5})
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("edgeqat")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("out", "KILLED")
    history = client.get_metric_history(run.info.run_id, "qat/loss")
    assert [(metric.step, metric.value) for metric in history] == [(1, 1.0), (2, 0.5)]
    assert set(run.data.metrics) == {"qat/loss", "qat/my metric___"}
