"""TensorBoard and MLflow, as a run logs to them. Their packages are imported here, and only where they are used."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from torch.utils.tensorboard import SummaryWriter

__all__ = ["MLflow", "TensorBoard", "Tracker", "import_mlflow", "import_tensorboard"]

EXPERIMENT = "edgeqat"


class Tracker(Protocol):
    """Where figures go."""

    def epoch(self, stage: str, index: int, figures: Mapping[str, float]) -> None:
        """Logs the figures of an epoch, counted from 1, of a stage of training."""
        ...

    def end(self, figures: Mapping[str, float], paths: Mapping[str, str]) -> None:
        """Logs the report's figures and where the artifacts are."""
        ...

    def close(self, finished: bool) -> None:
        """Ends the log; a run that is not finished may go on with it."""
        ...


def import_tensorboard() -> type[SummaryWriter]:
    """The writer of event files; an ImportError where tensorboard is not installed."""
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter


def import_mlflow() -> type[MlflowClient]:
    """The client; an ImportError where neither mlflow nor mlflow-skinny is installed."""
    from mlflow import MlflowClient

    found: type[MlflowClient] = MlflowClient
    return found


class TensorBoard:
    """Event files below a folder: one log a stage, so that TensorBoard draws the stages as curves of one chart."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writers: dict[str, SummaryWriter] = {}

    def epoch(self, stage: str, index: int, figures: Mapping[str, float]) -> None:
        """Scalars at step `index`."""
        # What a replaced run left in this folder from this epoch on is not shown any more.
        writer = self._writer(stage, index)
        for name, value in figures.items():
            writer.add_scalar(name, value, index)
        writer.flush()

    def end(self, figures: Mapping[str, float], paths: Mapping[str, str]) -> None:
        """Scalars at step 0 of the log `report`, and a text with the paths."""
        writer = self._writer("report", 0)
        for name, value in figures.items():
            writer.add_scalar(name, value, 0)
        writer.add_text("artifacts", "\n".join(f"- {name}: `{path}`" for name, path in paths.items()), 0)
        writer.flush()

    def close(self, finished: bool) -> None:
        """Closes the files."""
        for writer in self._writers.values():
            writer.close()

    def _writer(self, name: str, first: int) -> SummaryWriter:
        if name not in self._writers:
            self._writers[name] = import_tensorboard()(str(self._folder / name), purge_step=first)
        return self._writers[name]


class MLflow:
    """A run of the experiment `edgeqat` on a tracking server or store.

    Args:
        uri: The tracking URI, as MLflow takes it.
        name: Of a new run.
        run: The run to go on with, where there is one.
    """

    def __init__(self, uri: str, name: str, run: str | None) -> None:
        self._client = import_mlflow()(tracking_uri=uri)
        if run is None:
            experiment = self._client.get_experiment_by_name(EXPERIMENT)
            place = self._client.create_experiment(EXPERIMENT) if experiment is None else experiment.experiment_id
            self.run: str = self._client.create_run(place, run_name=name).info.run_id
        else:
            self.run = run
            self._client.update_run(run, status="RUNNING")

    def epoch(self, stage: str, index: int, figures: Mapping[str, float]) -> None:
        """Metrics `stage/name` at step `index`, all of them or none."""
        self._log({f"{stage}/{name}": value for name, value in figures.items()}, index)

    def end(self, figures: Mapping[str, float], paths: Mapping[str, str]) -> None:
        """Metrics `report/...`, and a tag for each path."""
        self._log({f"report/{name}": value for name, value in figures.items()}, 0)
        for name, path in paths.items():
            self._client.set_tag(self.run, _named(f"artifact/{name}"), path)

    def close(self, finished: bool) -> None:
        """The run's status: finished, or killed, which it is until it is resumed."""
        self._client.set_terminated(self.run, "FINISHED" if finished else "KILLED")

    def _log(self, figures: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        self._client.log_batch(self.run, [Metric(_named(name), value, now, step) for name, value in figures.items()])


def _named(name: str) -> str:
    """A name without what MLflow refuses."""
    return re.sub(r"[^\w/. -]", "_", name)
