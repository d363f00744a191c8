"""Experiment tracking: what a run logs to TensorBoard or MLflow, where its recipe asks for it.

Each tracker is told of every epoch once. `checkpoints/tracked.json` says what it was told, so that a resumed run goes
on where the log ends. What is logged has no effect on what is computed.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from edgeqat.callables import USER_ERRORS
from edgeqat.errors import CheckpointError, InputError
from edgeqat.files import to_json, write_atomically
from edgeqat.recipe import LogSection
from edgeqat.reporting.schema import Report
from edgeqat.trackers import MLflow, TensorBoard, Tracker, import_mlflow, import_tensorboard

__all__ = ["Tracking", "check_trackers", "tracked"]


class _Told(BaseModel):
    """What one tracker was told: the last epoch of each stage; and the id of its run, where it has one."""

    model_config = ConfigDict(extra="forbid", strict=True)
    run: str | None = None
    epochs: dict[str, int] = {}


class _Notes(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    tensorboard: _Told = _Told()
    mlflow: _Told = _Told()


class Tracking:
    """The trackers of a run that log its stages and its report; none by default.

    Args:
        path: The file that says what they were told; None where there are none.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path, self._notes = path, _Notes() if path is None else _read(path)
        self._trackers: list[tuple[str, Tracker, _Told]] = []
        self._ended = False

    def open(self, section: LogSection, name: str) -> None:
        """Opens the trackers that a recipe asks for; `name` is what the run is called there."""
        if section.tensorboard is not None:
            self._trackers.append(("tensorboard", TensorBoard(Path(section.tensorboard)), self._notes.tensorboard))
        if section.mlflow is not None:
            told = self._notes.mlflow
            with _failing("mlflow"):
                tracker = MLflow(section.mlflow, name, told.run)
            told.run = tracker.run
            self._write()
            self._trackers.append(("mlflow", tracker, told))

    def epoch(self, stage: str, index: int, figures: Mapping[str, float]) -> None:
        """Logs an epoch to those that were not told of it.

        Raises:
            InputError: A tracker fails; the epoch itself is kept.
        """
        for key, tracker, told in self._trackers:
            before = told.epochs.get(stage, 0)
            if index <= before:
                continue
            # Noted first: a run that is killed in between rather misses an epoch than logs it twice.
            told.epochs[stage] = index
            self._write()
            try:
                with _failing(key):
                    tracker.epoch(stage, index, figures)
            except InputError:
                told.epochs[stage] = before
                self._write()
                raise

    def end(self, report: Report, folder: Path) -> None:
        """Logs what the run in `folder` came to: the figures of its report, and where its artifacts are.

        Raises:
            InputError: A tracker fails.
        """
        figures, paths = _figures(report), {"report": str(folder / "report.html")}
        paths |= {f"{r.variant}/{r.runtime}": str(folder / r.artifact) for r in report.results if r.artifact}
        for key, tracker, _ in self._trackers:
            with _failing(key):
                tracker.end(figures, paths)
        self._ended = True

    def close(self) -> None:
        """Closes all; a run that has not come to its end may go on."""
        for key, tracker, _ in self._trackers:
            with _failing(key):
                tracker.close(self._ended)

    def _write(self) -> None:
        if self._path is not None:
            write_atomically(self._path, to_json(self._notes.model_dump()))


def check_trackers(section: LogSection) -> None:
    """Checks that the packages of what a recipe logs to can be imported.

    Raises:
        InputError: They cannot; the message names the pip install.
    """
    asked = {"tensorboard": section.tensorboard, "mlflow": section.mlflow}
    importing = {"tensorboard": import_tensorboard, "mlflow": import_mlflow}
    for key in (key for key, place in asked.items() if place is not None):
        try:
            importing[key]()
        except USER_ERRORS as error:  # of their code
            raise InputError(
                f"log.{key}: {key} cannot be imported ({error}); install it: pip install 'edgeqat[{key}]', "
                f"or go without it: --set log.{key}=null"
            ) from error


@contextlib.contextmanager
def tracked(section: LogSection, folder: Path) -> Iterator[Tracking]:
    """The trackers that a recipe asks for, while the run in `folder` goes on.

    Raises:
        InputError: One cannot be opened, or fails.
    """
    tracking = Tracking(folder / "checkpoints" / "tracked.json")
    try:
        tracking.open(section, folder.resolve().name)
        yield tracking
    except BaseException:
        with contextlib.suppress(InputError):  # what stopped the run is what its user has to know
            tracking.close()
        raise
    tracking.close()


def _figures(report: Report) -> dict[str, float]:
    """The figures of a report that there are, by `variant/runtime/name`."""
    found = {"gate_passed": float(report.gate.passed)}
    for row in report.results:
        told = {row.metric.name: row.metric.value, "drop": row.drop, "file_bytes": row.file_bytes}
        told["latency_p50_ms"] = None if row.latency_ms is None else row.latency_ms.p50
        told["bit_identical"] = None if row.parity is None else row.parity.bit_identical
        found |= {
            f"{row.variant}/{row.runtime}/{name}": float(value) for name, value in told.items() if value is not None
        }
    return found


@contextlib.contextmanager
def _failing(key: str) -> Iterator[None]:
    try:
        yield
    except USER_ERRORS as error:  # whatever a client, its server or a disk fails with
        raise InputError(
            f"log.{key} fails: {type(error).__name__}: {error}; what is trained is kept: --resume goes on, "
            f"with --set log.{key}=null without this log"
        ) from error


def _read(path: Path) -> _Notes:
    if not path.is_file():
        return _Notes()
    try:
        return _Notes.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, ValidationError) as error:
        raise CheckpointError(f"{path} cannot be read; restore it, or start afresh with --overwrite") from error
