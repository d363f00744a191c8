"""Recipes: everything a run depends on, as validated YAML that round-trips exactly."""

from __future__ import annotations

import difflib
import hashlib
import importlib.resources
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from edgeqat.callables import is_callable_name
from edgeqat.errors import RecipeError
from edgeqat.recipe_compute import ComputeSection
from edgeqat.recipe_numbers import Count, Fraction, Number, Positive, Rate
from edgeqat.recipe_quantize import QuantizeSection, Section
from edgeqat.recipe_train import TrainSection
from edgeqat.strict_yaml import MAX_DEPTH, dump_yaml, parse_yaml
from edgeqat.target_name import is_target_file
from edgeqat.validation import explain

__all__ = ["Recipe", "bundled_recipes", "bundled_text", "expanded", "is_dataset_name", "load_recipe"]

MAX_THREADS = 1024

BUILT_IN_SOURCES = ("digits", "cifar10")
"""Names of data that win over a folder of the same name."""


class ModelSection(Section):
    """The float model."""

    factory: str = "edgeqat.zoo:edge_model"
    args: dict[str, Any] = Field(default={})
    weights: str | None = None

    @field_validator("args")
    @classmethod
    def _plain(cls, args: dict[str, Any]) -> dict[str, Any]:
        try:
            plain = json.loads(json.dumps(args, allow_nan=False)) == args
        except (TypeError, ValueError):
            plain = False
        if not plain:
            raise ValueError("wanted finite numbers, strings, booleans, nulls, lists and mappings with string keys")
        return args


class DataSection(Section):
    """The data, and how a batch is made of it."""

    source: str = "digits"
    image_size: Positive = 32
    mean: list[Number] | None = None
    std: list[Number] | None = None
    augment: list[str] | None = None
    batch_size: Positive = 32
    calibration_n: Positive = 512
    input: Literal["normalised", "pixels"] = "normalised"
    resize: Literal["stretch", "center_crop"] = "stretch"
    storage: Literal["memory", "disk", "stream"] = "memory"
    shuffle_buffer: Positive = 10_000
    max_corrupt: Count = 0


class TaskSection(Section):
    """What is minimised, and what is reported."""

    loss: str = "cross_entropy"
    metric: str = "top1"


class MeasureSection(Section):
    """How latency is measured."""

    threads: Annotated[int, Field(ge=1, le=MAX_THREADS)] = 1
    batch: Positive = 1


class GateSection(Section):
    """Limits that decide about shipping; an absent one is not checked."""

    max_drop: Number | None = None
    min_size_ratio: Rate | None = None
    min_speedup: Rate | None = None
    min_agreement: Fraction | None = None
    runtimes: Annotated[list[str], Field(min_length=1)] | None = None


class LogSection(Section):
    """Where figures are logged while a run goes on; nothing that a run computes depends on it."""

    tensorboard: str | None = None
    mlflow: str | None = None


class Recipe(Section):
    """A whole recipe; docs/recipes.md has every key."""

    model: ModelSection = ModelSection()
    data: DataSection = DataSection()
    task: TaskSection = TaskSection()
    quantize: QuantizeSection = QuantizeSection()
    train: TrainSection | None = TrainSection()
    export: list[str] = Field(default=["onnxruntime"], min_length=1)
    measure: MeasureSection = MeasureSection()
    gate: GateSection = GateSection()
    log: LogSection = LogSection()
    compute: ComputeSection = ComputeSection()

    @field_validator("export", mode="before")
    @classmethod
    def _listed(cls, export: Any) -> Any:
        if isinstance(export, str):
            raise ValueError(f"wanted a list, write [{export}]")
        return export

    @model_validator(mode="after")
    def _batch_norm(self) -> Recipe:
        mode, train = self.quantize.batch_norm, self.train
        if train is not None and train.freeze_batch_norm_after is not None and mode != "frozen":
            raise ValueError(f"train.freeze_batch_norm_after wants quantize.batch_norm: frozen, found {mode}")
        if train is not None and train.reestimate_batches > 0 and mode == "fold":
            raise ValueError("train.reestimate_batches wants quantize.batch_norm: live or frozen, found fold")
        return self

    def to_yaml(self) -> str:
        """The recipe in full, every default written out; loading it gives this recipe again."""
        return dump_yaml(self.model_dump())

    def identity(self) -> dict[str, Any]:
        """What decides a run's results: not `log` and `compute`, which may differ when it is resumed."""
        return self.model_dump(mode="json", exclude={"log", "compute"})

    def sha256(self) -> str:
        """Hash of its meaning."""
        text = json.dumps(self.identity(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def bundled_recipes() -> dict[str, str]:
    """The recipes that come with edgeqat: name to its one-line description, the first comment of the file."""
    folder = importlib.resources.files("edgeqat.recipes")
    found = {}
    for entry in sorted(folder.iterdir(), key=lambda e: e.name):
        if entry.name.endswith(".yaml"):
            first = entry.read_text(encoding="utf-8").splitlines()[0]
            found[entry.name.removesuffix(".yaml")] = first.removeprefix("#").strip()
    return found


def bundled_text(name: str) -> str:
    """A bundled recipe as it is written, comments included.

    Raises:
        RecipeError: There is none of that name.
    """
    bundled = bundled_recipes()
    if name not in bundled:
        close = difflib.get_close_matches(name, bundled, n=1)
        hint = f"did you mean {close[0]}?" if close else f"bundled: {', '.join(bundled)}"
        raise RecipeError(f"found no bundled recipe {name!r}; {hint}")
    return (importlib.resources.files("edgeqat.recipes") / f"{name}.yaml").read_text(encoding="utf-8")


def load_recipe(name_or_path: str, settings: Sequence[str] = ()) -> Recipe:
    """A bundled recipe by name, or one from a YAML file, changed by `key.path=value` settings.

    Paths in the file are relative to it; those in settings are relative to the working directory.

    Raises:
        RecipeError: There is no such recipe, it is no YAML, or a key or value does not fit (dotted path named).
    """
    text, base = _read(name_or_path)
    data = parse_yaml(text, name_or_path)
    data = {} if data is None else data
    if not isinstance(data, dict):
        raise RecipeError(f"{name_or_path} holds a {type(data).__name__}, wanted a mapping of sections")
    _resolve_paths(data, base)
    for setting in settings:
        _apply(data, setting)
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise RecipeError(f"{name_or_path}: {explain(error, Recipe)}") from error


def is_dataset_name(name: str) -> bool:
    """Whether a name has the form of the datasets library's, `name` or `org/name`."""
    return re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) is not None


def _read(name_or_path: str) -> tuple[str, Path]:
    bundled = bundled_recipes()
    if name_or_path in bundled:
        return bundled_text(name_or_path), Path.cwd()
    path = Path(name_or_path)
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8"), path.resolve().parent
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"{path} cannot be read: {error}") from error
    if (path / "recipe.yaml").is_file():
        raise RecipeError(f"found the directory {path}, wanted a recipe; did you mean {path / 'recipe.yaml'}?")
    close = difflib.get_close_matches(name_or_path, bundled, n=1)
    hint = f"; did you mean {close[0]}?" if close else f"; bundled: {', '.join(bundled)}"
    raise RecipeError(f"found no recipe file {name_or_path!r} and no bundled recipe of that name{hint}")


def _apply(data: dict[str, Any], setting: str) -> None:
    """Sets one `key.path=value`; the value is YAML."""
    path, equals, raw = setting.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise RecipeError(f"found --set {setting!r}, wanted key.path=value")
    if len(keys) > MAX_DEPTH:
        raise RecipeError(f"found --set with a path of {len(keys)} keys, wanted at most {MAX_DEPTH}")
    value = parse_yaml(raw, f"--set {path}: {raw[:80]!r}") if raw else ""
    changed: dict[str, Any] = {}
    inner = changed
    for key in keys[:-1]:
        inner[key] = {}
        inner = inner[key]
    inner[keys[-1]] = value
    _resolve_paths(changed, Path.cwd())
    _merge(data, changed)


def _merge(data: dict[str, Any], changed: Mapping[str, Any]) -> None:
    for key, value in changed.items():
        # An empty mapping replaces what was there: how else could arguments be taken away?
        if isinstance(value, dict) and value and isinstance(data.get(key), dict):
            _merge(data[key], value)
        else:
            data[key] = value


def _resolve_paths(data: dict[str, Any], base: Path) -> None:
    """Makes the paths of a recipe absolute, in place, as far as they are strings at all."""
    model, source = data.get("model"), data.get("data")
    if isinstance(model, dict):
        if isinstance(model.get("weights"), str):
            model["weights"] = str(_absolute(model["weights"], base))
        factory = model.get("factory")
        if isinstance(factory, str):
            model["factory"] = _absolute_file(factory, base)
    if isinstance(source, dict) and isinstance(source.get("source"), str):
        source["source"] = _absolute_source(source["source"], base)
    export = data.get("export")
    if isinstance(export, list):
        data["export"] = [str(_absolute(t, base)) if isinstance(t, str) and is_target_file(t) else t for t in export]
    log = data.get("log")
    if isinstance(log, dict) and isinstance(log.get("tensorboard"), str):
        log["tensorboard"] = str(_absolute(log["tensorboard"], base))
    quantize = data.get("quantize")
    if isinstance(quantize, dict) and isinstance(quantize.get("fusions"), list):
        fusions = quantize["fusions"]
        quantize["fusions"] = [_absolute_file(f, base) if isinstance(f, str) else f for f in fusions]
    task = data.get("task")
    if isinstance(task, dict):
        for key in ("loss", "metric"):
            if isinstance(task.get(key), str):
                task[key] = _absolute_file(task[key], base)


def expanded(path: str) -> Path:
    """A path with `~` and `~user` replaced; one of a user who does not exist stays as it is."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def _absolute(path: str, base: Path) -> Path:
    return (base / expanded(path)).resolve()


def _absolute_source(source: str, base: Path) -> str:
    """A folder or file.py with an absolute path; the name of a data set or of a callable in a module as it is.

    A name such as org/name is a folder only where there is one.
    """
    if not source or source in BUILT_IN_SOURCES:
        return source
    try:
        exists = (base / expanded(source)).exists()
    except OSError:  # a folder that may not be entered, a name that is too long: reading it says so
        exists = False
    if not exists and is_callable_name(source):
        return _absolute_file(source, base)
    is_path = exists or not is_dataset_name(source)
    return str(_absolute(source, base)) if is_path else source


def _absolute_file(target: str, base: Path) -> str:
    """`file.py:callable` with an absolute file; anything else as it is."""
    file, colon, name = target.rpartition(":")
    return f"{_absolute(file, base)}:{name}" if colon and file.endswith(".py") else target
