"""report.json: its structure, and the decision it carries."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from edgeqat.errors import EdgeqatError, InputError
from edgeqat.recipe import GateSection
from edgeqat.reporting.network_schema import NetworkRows, StageRow
from edgeqat.reporting.record import Record

__all__ = [
    "AidRow",
    "AidScore",
    "AutoRow",
    "AutoStep",
    "ChangedSample",
    "Changes",
    "Check",
    "ClassRow",
    "FlippedSample",
    "Flips",
    "Gate",
    "LatencyRow",
    "MetricRow",
    "OpsRow",
    "ParityRow",
    "Report",
    "Row",
    "judge",
    "read_report",
]

SCHEMA = 1


class MetricRow(Record):
    """A metric with its 95% interval over n samples; the figures of a share are in 0..1."""

    name: str
    value: float
    ci95: tuple[float, float]
    n: int
    higher_is_better: bool = True
    is_share: bool = True


class LatencyRow(Record):
    """Percentiles in milliseconds; `samples` is the file of raw timings, relative to the report."""

    batch: int
    threads: int
    n: int
    p50: float
    p90: float
    p99: float
    samples: str


class ValueRow(Record):
    """One value inside a network: how many of its integers are off by how many steps; 0 counts the equal ones."""

    name: str
    op: str
    histogram: dict[int, int]


class ParityRow(Record):
    """Comparison with the reference where an arithmetic is known, else with the simulation."""

    against: str
    n: int
    bit_identical: float
    max_error_steps: float
    agreement: float
    first_difference: str | None
    output_error: float = 0.0
    histogram: dict[int, int] = Field(default_factory=dict)
    values: list[ValueRow] = Field(default_factory=list)
    unseen: list[str] = Field(default_factory=list)


class OpTimeRow(Record):
    """What a runtime's profiler says of one kind of op of the graph that really runs: milliseconds a call."""

    op: str
    count: int
    ms: float


class HazardRow(Record):
    """What an op may do elsewhere; see `edgeqat.portability.Hazard`."""

    kind: str
    where: str
    op: str
    found: float
    limit: float
    advice: str


class OpsRow(Record):
    """How many ops run in integers, how many in float."""

    integer: int
    float: int


class FlippedSample(Record):
    """A sample that the two models classify differently, at least one of them wrongly; classes by name."""

    index: int
    target: str | None
    float_class: str
    quantized_class: str


class Flips(Record):
    """How many samples changed sides from the float twin to the quantized model, and the first 50 of them."""

    right_to_wrong: int
    wrong_to_right: int
    wrong_to_wrong: int
    samples: list[FlippedSample]


class ClassRow(Record):
    """The metric of one class, over the n samples of it; None where the class does not occur for a model."""

    name: str
    n: int
    float_value: float | None
    quantized_value: float | None
    drop: float | None


class ChangedSample(Record):
    """The metric of one sample alone."""

    index: int
    float_value: float
    quantized_value: float
    drop: float


class Changes(Record):
    """Which samples and classes a quantized model changed, against its float twin on the same runtime.

    `index` counts the test samples from 0, in the order of the split; a drop is positive where the quantized model is
    worse. `flips` is there for metrics of right and wrong, `largest` (the 50 largest changes) for all others.
    """

    flips: Flips | None
    largest: list[ChangedSample] | None
    per_class: list[ClassRow] | None


class Row(Record):
    """One variant on one runtime; `speedup_ci95` is the 95% interval of its speed by that of its float twin there."""

    variant: Literal["float", "float_finetuned", "ptq", "qat"]
    runtime: str
    engine: str | None
    arithmetic: str | None
    metric: MetricRow
    drop: float | None
    drop_ci95: tuple[float, float] | None
    file_bytes: int | None
    payload_bytes: int | None
    latency_ms: LatencyRow | None
    speedup_ci95: tuple[float, float] | None = None
    peak_memory_bytes: int | None = None
    parity: ParityRow | None
    ops: OpsRow | None
    profile: list[OpTimeRow] = Field(default_factory=list)
    artifact: str | None
    sha256: str | None
    changes: Changes | None = None
    hazards: list[HazardRow] = Field(default_factory=list)


class AidScore(Record):
    """What the simulation scores over some samples: its metric, and how near its outputs are to the float model's.

    `metric` is None without labels. `sqnr_db` is ten times the decimal logarithm of the power of the float outputs
    over that of the difference; None where there is no difference.
    """

    metric: float | None
    sqnr_db: float | None


class AidRow(Record):
    """An aid of post-training quantization: the scores before it and after it, on the same n samples of `split`."""

    aid: Literal["equalize", "adaround", "correct_bias"]
    split: Literal["validation", "calibration"]
    n: int
    before: AidScore
    after: AidScore
    changed: str


class Check(Record):
    """One limit of the gate, against one row."""

    name: str
    variant: str
    runtime: str
    limit: float
    value: float
    passed: bool


class Gate(Record):
    """Whether the run may ship: every check passed."""

    passed: bool
    checks: list[Check]


class AutoStep(Record):
    """One step of `run --auto`.

    `drop` is the largest over the runtimes of the gate, on the test split where `test` says so, else on the samples
    that were searched on; `folder` is where the step's own run is, relative to the report.
    """

    what: str
    drop: float | None
    drop_ci95: tuple[float, float] | None
    test: bool
    verdict: str
    folder: str | None


class AutoRow(Record):
    """How `run --auto` came to the recipe of this report; `recipe` is the file that reproduces it."""

    steps: list[AutoStep]
    conclusion: str
    looks_at_test: int
    trials: int
    recipe: str


class Report(Record):
    """Everything a run found; see `Files` in docs/design.md."""

    schema_version: int = SCHEMA
    edgeqat: str
    recipe: dict[str, Any]
    recipe_sha256: str
    machine: dict[str, Any]
    data: dict[str, Any]
    results: list[Row] = Field(min_length=1)
    gate: Gate
    ptq_aids: list[AidRow] = Field(default_factory=list)
    auto: AutoRow | None = None
    plan: str = ""
    network: NetworkRows | None = None
    training: list[StageRow] = Field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """As written to report.json."""
        data = self.model_dump(mode="json")
        # pydantic reserves the name `schema` on its models.
        return {"schema": data.pop("schema_version"), **data}

    def row(self, variant: str, runtime: str) -> Row | None:
        """The row of a variant on a runtime."""
        return next((r for r in self.results if (r.variant, r.runtime) == (variant, runtime)), None)


def read_report(folder: Path) -> Report:
    """The report of a finished run.

    Raises:
        InputError: The directory holds no finished run, or its report.json cannot be read.
    """
    path = folder / "report.json"
    if not path.is_file():
        if (folder / "recipe.yaml").is_file():
            raise InputError(f"{folder} holds an unfinished run: it has no report.json; finish it first")
        raise InputError(f"found no report.json in {folder}, wanted the directory of a finished run")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read ({error}); run the recipe again") from error
    if not isinstance(data, dict) or "schema" not in data:
        raise InputError(f"{path} is no report of edgeqat: it has no schema; run the recipe again")
    schema = data.pop("schema")
    if schema != SCHEMA:
        raise InputError(f"{path} has schema {schema!r}, this edgeqat reads {SCHEMA}; use the version that wrote it")
    try:
        return Report.model_validate({**data, "schema_version": schema})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InputError(f"{path} does not fit the schema at {where}: {first['msg']}; run the recipe again") from error


FLOAT_TWIN = {"ptq": "float", "qat": "float_finetuned"}
"""Which float row a quantized one is compared with: the one that had the same training."""


def judge(rows: Sequence[Row], gate: GateSection, exported: Sequence[str], variant: str) -> Gate:
    """Checks the rows of `variant` on each gated runtime against the limits that the gate sets."""
    checks: list[Check] = []
    for runtime in exported if gate.runtimes is None else gate.runtimes:
        row = next(r for r in rows if (r.variant, r.runtime) == (variant, runtime))
        twin = next(r for r in rows if (r.variant, r.runtime) == (FLOAT_TWIN[variant], runtime))
        checks += _checks(row, twin, gate)
    return Gate(passed=all(check.passed for check in checks), checks=checks)


def _checks(row: Row, twin: Row, gate: GateSection) -> list[Check]:
    found: list[tuple[str, float | None, float | None, bool]] = [
        ("max_drop", gate.max_drop, row.drop, False),
        ("min_size_ratio", gate.min_size_ratio, size_ratio(row, twin), True),
        ("min_speedup", gate.min_speedup, speedup(row, twin), True),
        ("min_agreement", gate.min_agreement, None if row.parity is None else row.parity.agreement, True),
    ]
    checks: list[Check] = []
    for name, limit, value, at_least in found:
        if limit is None:
            continue
        if value is None:
            raise EdgeqatError(f"gate.{name}: not measured for {row.variant} on {row.runtime}")
        passed = value >= limit if at_least else value <= limit
        checks.append(
            Check(name=name, variant=row.variant, runtime=row.runtime, limit=limit, value=value, passed=passed)
        )
    return checks


def size_ratio(row: Row, twin: Row) -> float | None:
    """Size of the float file over that of the quantized one."""
    if row.file_bytes is None or twin.file_bytes is None:
        return None
    return twin.file_bytes / row.file_bytes


def speedup(row: Row, twin: Row) -> float | None:
    """Median latency of the float artifact on the same runtime over that of the quantized one."""
    if row.latency_ms is None or twin.latency_ms is None:
        return None
    return twin.latency_ms.p50 / row.latency_ms.p50
