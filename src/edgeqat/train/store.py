"""Checkpoints of a run: after every epoch of every stage and within long ones, and the final weights of each.

    checkpoints/float.safetensors, .json                      final weights of a stage, once it is done
    checkpoints/epochs/float-0007.safetensors, .json          training after epoch 7: weights, optimizer, generators
    checkpoints/epochs/float-0007-000120.safetensors, .json   after 120 steps more

The JSON file is written last and holds the sha256 of the other: a pair is whole, or it does not count. A damaged
pair is passed over, with a line that says so. A whole one that belongs to other settings is an error.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from edgeqat.errors import CheckpointError
from edgeqat.files import write_atomically
from edgeqat.ranks import ALONE, Ranks
from edgeqat.run_folder import check_there
from edgeqat.train.checkpoint import put_weights, weights_of
from edgeqat.train.state import Epoch, Settings, TrainingState, Underway
from edgeqat.version import __version__

__all__ = ["CheckpointStore", "RunIdentity", "first_difference"]

SCHEMA = 1
KEPT = 2
"""How many of the last epochs are kept, beside the best one."""


@dataclass(frozen=True)
class RunIdentity:
    """What a checkpoint must agree with to be gone on from."""

    recipe: Mapping[str, Any]
    recipe_sha256: str
    plan_hash: str
    data_sha256: str


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class _Environment(_Part):
    """What changes the last bits of a float sum."""

    edgeqat: str
    torch: str
    cpu: str
    threads: int
    processes: int = 1


class _Weights(_Part):
    file: str
    sha256: str


class _Position(_Part):
    """Where the next step begins: `epoch` and `step` are counted from 0."""

    epoch: int
    step: int


class _Training(_Part):
    settings: Settings
    schedule: str
    next: _Position
    history: list[Epoch]
    underway: Underway | None = None


class _Record(_Part):
    """The JSON file of a pair; `training` is None for final weights."""

    schema_version: int = Field(alias="schema")
    environment: _Environment
    stage: str
    epoch: int
    recipe_sha256: str
    recipe: dict[str, Any]
    plan_hash: str
    data_sha256: str
    weights: _Weights
    training: _Training | None


class _DamagedError(Exception):
    """A pair that does not count; its message says why."""


class CheckpointStore:
    """The folder `checkpoints/` of one run.

    Args:
        folder: The folder; made when first written to.
        identity: Of the run.
        higher_is_better: Direction of the validation metric.
        tell: Called with a line for every checkpoint that is passed over, and once if this machine or its settings
            differ from those that a checkpoint was made on.
        ranks: The processes that train together. The first one alone reads and writes, and tells the others, which
            call the same methods; only `history` and `last_good` look at the folder of who calls them.
    """

    def __init__(
        self,
        folder: Path,
        identity: RunIdentity,
        higher_is_better: bool,
        tell: Callable[[str], None],
        ranks: Ranks = ALONE,
    ) -> None:
        self._folder, self._epochs = folder, folder / "epochs"
        self._identity = identity
        self._sign = 1.0 if higher_is_better else -1.0
        self._tell, self._ranks = tell, ranks
        self._compared = False

    def save_state(self, stage: str, state: TrainingState) -> None:
        """Writes a state, then removes those that are neither among the last epochs nor the best one.

        Raises:
            OutputError: It cannot be written; older checkpoints are untouched.
        """
        if not self._ranks.first:
            return
        tensors = {f"model/{name}": tensor for name, tensor in state.model.items()}
        for name, kept in state.optimizer.items():
            tensors |= {f"optimizer/{name}/{key}": tensor for key, tensor in kept.items()}
        tensors |= {f"rng/{device}": tensor for device, tensor in state.rng.items()}
        tensors |= {f"aids/{name}": tensor for name, tensor in state.aids.items()}
        tensors |= {f"others/{name}": tensor for name, tensor in state.others.items()}
        place = _Position(epoch=len(state.history), step=0 if state.underway is None else state.underway.steps)
        training = _Training(
            settings=state.settings,
            schedule="cosine",
            next=place,
            history=list(state.history),
            underway=state.underway,
        )
        self._write(self._path(stage, place), stage, place.epoch, tensors, training)
        self._prune(stage, place, state.history)

    def latest(self, stage: str) -> TrainingState | None:
        """The last state of a stage whose checkpoint is whole; None to begin at the beginning.

        Raises:
            CheckpointError: It is of another schema, recipe, plan or data.
        """
        with self._ranks.together():
            found = self._latest(stage) if self._ranks.first else None
        return self._ranks.of_first(found)

    def _latest(self, stage: str) -> TrainingState | None:
        for place in self._found(stage):
            path = self._path(stage, place)
            try:
                return self._read_state(path, stage, place)
            except _DamagedError as damage:
                self._tell(f"{path} is passed over: {damage}")
        return None

    def history(self, stage: str) -> tuple[Epoch, ...]:
        """The epochs of a stage, as its newest readable checkpoint tells them; none where there is none."""
        for place in self._found(stage):
            try:
                training = _parse(self._path(stage, place)).training
            except _DamagedError as damage:
                self._tell(f"{self._path(stage, place)} is passed over: {damage}")
                continue
            if training is not None:
                return tuple(training.history)
        return ()

    def last_good(self, stage: str) -> Path | None:
        """The file of the last state of a stage that was written."""
        places = self._found(stage)
        return self._path(stage, places[0]).with_suffix(".safetensors") if places else None

    def save_final(self, stage: str, model: nn.Module, epochs: int) -> None:
        """Writes the weights that a stage ends with, after so many epochs.

        Raises:
            OutputError: They cannot be written.
        """
        with self._ranks.together():
            if self._ranks.first:
                self._write(self._folder / f"{stage}.json", stage, epochs, weights_of(model), None)

    def load_final(self, stage: str, model: nn.Module) -> bool:
        """Loads the weights that a stage ended with; False, and nothing loaded, if it did not end yet.

        Raises:
            CheckpointError: They are of another schema, recipe, plan or data.
            ModelError: They do not fit the model.
        """
        with self._ranks.together():
            found = self._final(stage) if self._ranks.first else None
        tensors = self._ranks.of_first(found)
        if tensors is None:
            return False
        put_weights(model, tensors, str(self._folder / f"{stage}.safetensors"))
        return True

    def _final(self, stage: str) -> dict[str, Tensor] | None:
        path = self._folder / f"{stage}.json"
        if not path.exists():
            return None
        try:
            return self._read(path, stage)[1]
        except _DamagedError as damage:
            self._tell(f"{path} is passed over: {damage}")
            return None

    def _path(self, stage: str, place: _Position) -> Path:
        within = f"-{place.step:06d}" if place.step else ""
        return self._epochs / f"{stage}-{place.epoch:04d}{within}.json"

    def _found(self, stage: str) -> list[_Position]:
        """Where the states of a stage that have a JSON file stand, the last one first."""
        if not self._epochs.is_dir():
            return []
        pattern = rf"{re.escape(stage)}-(\d{{4,}})(?:-(\d{{6,}}))?\.json"
        named = [re.fullmatch(pattern, path.name) for path in self._epochs.iterdir()]
        places = [(int(match[1]), int(match[2] or 0)) for match in named if match is not None]
        return [_Position(epoch=epoch, step=step) for epoch, step in sorted(places, reverse=True)]

    def _prune(self, stage: str, newest: _Position, history: tuple[Epoch, ...]) -> None:
        scores = {e.index: self._sign * e.metric for e in history if e.metric is not None and e.metric == e.metric}
        keep = {epoch.index for epoch in history[-KEPT:]} | (
            {max(scores, key=lambda e: scores[e])} if scores else set()
        )
        for place in self._found(stage):
            if place != newest and (place.step or place.epoch not in keep):
                path = self._path(stage, place)
                path.unlink(missing_ok=True)  # first, so that no JSON file ever stands alone
                path.with_suffix(".safetensors").unlink(missing_ok=True)

    def _write(
        self, path: Path, stage: str, epoch: int, tensors: Mapping[str, Tensor], training: _Training | None
    ) -> None:
        check_there(self._folder.parent)
        raw = safetensors.torch.save(dict(tensors))
        weights = path.with_suffix(".safetensors")
        record = _Record(
            schema=SCHEMA,
            environment=_environment(self._ranks.size),
            stage=stage,
            epoch=epoch,
            recipe_sha256=self._identity.recipe_sha256,
            recipe=dict(self._identity.recipe),
            plan_hash=self._identity.plan_hash,
            data_sha256=self._identity.data_sha256,
            weights=_Weights(file=weights.name, sha256=hashlib.sha256(raw).hexdigest()),
            training=training,
        )
        write_atomically(weights, raw)
        write_atomically(path, record.model_dump_json(by_alias=True, indent=1) + "\n")

    def _read(self, path: Path, stage: str) -> tuple[_Record, dict[str, Tensor]]:
        record = _parse(path)
        self._compare(record, path)
        weights = path.with_suffix(".safetensors")
        if record.stage != stage or record.weights.file != weights.name:
            raise _DamagedError(f"it describes {record.weights.file} of the stage {record.stage}")
        try:
            raw = weights.read_bytes()
        except OSError as error:
            raise _DamagedError(f"{weights.name} cannot be read: {error.strerror}") from error
        if hashlib.sha256(raw).hexdigest() != record.weights.sha256:
            raise _DamagedError(f"{weights.name} is not the file that was written: its sha256 differs")
        try:
            return record, safetensors.torch.load(raw)
        except safetensors.SafetensorError as error:
            raise _DamagedError(f"{weights.name} is no safetensors file: {error}") from error

    def _read_state(self, path: Path, stage: str, place: _Position) -> TrainingState:
        record, tensors = self._read(path, stage)
        training = record.training
        if training is None or not place.epoch == record.epoch == len(training.history):
            raise _DamagedError("it does not describe training after its epoch")
        if training.next != place or place.step != (training.underway.steps if training.underway else 0):
            raise _DamagedError("it does not describe training after its step")
        groups: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}, "rng": {}, "aids": {}, "others": {}}
        for name, tensor in tensors.items():
            group, _, rest = name.partition("/")
            if group not in groups:
                raise _DamagedError(f"it holds a tensor {name}")
            groups[group][rest] = tensor
        optimizer: dict[str, dict[str, Tensor]] = {}
        for name, tensor in groups["optimizer"].items():
            parameter, _, key = name.rpartition("/")
            optimizer.setdefault(parameter, {})[key] = tensor
        if "cpu" not in groups["rng"]:
            raise _DamagedError("it holds no state of the random generator")
        model, rng, aids, others = groups["model"], groups["rng"], groups["aids"], groups["others"]
        history = tuple(training.history)
        return TrainingState(training.settings, history, model, optimizer, rng, aids, training.underway, others)

    def _compare(self, record: _Record, path: Path) -> None:
        """Refuses a checkpoint of another run; says once what else differs."""
        wanted = self._identity
        if record.recipe_sha256 != wanted.recipe_sha256:
            difference = first_difference(record.recipe, wanted.recipe) or "its hash differs"
            raise CheckpointError(f"{path} was made with another recipe: {difference}; {AFRESH}")
        if record.plan_hash != wanted.plan_hash:
            raise CheckpointError(f"{path} was made with another plan: the model's code has changed since; {AFRESH}")
        if record.data_sha256 != wanted.data_sha256:
            raise CheckpointError(f"{path} was made with other data than there is now; {AFRESH}")
        if not self._compared:
            self._compared = True
            then, now = record.environment.model_dump(), _environment(self._ranks.size).model_dump()
            found = ", ".join(f"{key} {then[key]} then and {now[key]} now" for key in then if then[key] != now[key])
            if found:
                self._tell(f"warning: {found}: the last bits may differ from an uninterrupted run's")


AFRESH = "restore it, or start afresh with --overwrite"


def first_difference(found: Any, wanted: Any, path: str = "") -> str | None:
    """The first key in which two recipes differ: `train.seed is 0 there, 1 here`; None if they are equal."""
    if isinstance(found, Mapping) and isinstance(wanted, Mapping):
        for key in dict.fromkeys([*wanted, *found]):
            inner = f"{path}.{key}" if path else str(key)
            if (key in found) != (key in wanted):
                return f"{inner} is missing {'here' if key in found else 'there'}"
            difference = first_difference(found[key], wanted[key], inner)
            if difference is not None:
                return difference
        return None
    if type(found) is type(wanted) and found == wanted:
        return None
    return f"{path} is {json.dumps(found)} there, {json.dumps(wanted)} here"


def _environment(processes: int) -> _Environment:
    return _Environment(
        edgeqat=__version__,
        torch=str(torch.__version__),
        cpu=torch.backends.cpu.get_cpu_capability(),
        threads=torch.get_num_threads(),
        processes=processes,
    )


def _parse(path: Path) -> _Record:
    try:
        text = path.read_text(encoding="utf-8")
        data = json.loads(text)
    except OSError as error:
        raise _DamagedError(f"it cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise _DamagedError("it is no JSON") from error
    schema = data.get("schema") if isinstance(data, dict) else None
    if isinstance(schema, int) and schema != SCHEMA:
        raise CheckpointError(f"{path} has checkpoint schema {schema}, this edgeqat reads {SCHEMA}; {AFRESH}")
    try:
        return _Record.model_validate_json(text)
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        raise _DamagedError(f"it is no checkpoint of edgeqat: {where or 'it'} does not fit") from error
