"""The parts of report.json that show the network: its ops, its values on their grids, its training."""

from __future__ import annotations

from typing import Literal

from edgeqat.reporting.record import Record

__all__ = ["DistributionRow", "EpochRow", "NetworkRows", "OpRow", "StageRow"]


class OpRow(Record):
    """An op of the program that ships, as the plan has it.

    `reads` names the ops whose values it reads; `sqnr_db` is that of its result where everything is quantized,
    None where there is no error or no grid; `clipped` the share of its float values beyond the ends of its grid.
    """

    name: str
    kind: str
    runs: Literal["integer", "float"]
    module: str
    reads: list[str]
    grid_in: str
    grid_weight: str
    grid_out: str
    fused: str
    group: str
    reason: str
    sqnr_db: float | None = None
    clipped: float | None = None


class DistributionRow(Record):
    """A value or weight over its grid; see `edgeqat.diagnose.distributions.Distribution`.

    `counts` are over equal bins from `low` to `high`; the grid's integers stand for `grid_low` to `grid_high`, in
    steps of `scale`, the largest of several.
    """

    name: str
    part: Literal["activation", "weight"]
    low: float
    high: float
    grid_low: float
    grid_high: float
    scale: float
    clipped: float
    sqnr_db: float | None
    counts: list[int]


class NetworkRows(Record):
    """The network of the variant that the gate judges; `n` samples were looked at."""

    variant: str
    n: int
    ops: list[OpRow]
    distributions: list[DistributionRow]


class EpochRow(Record):
    """An epoch; `metric` is that of the validation split, None without one."""

    index: int
    loss: float
    lr: float
    metric: float | None
    seconds: float


class StageRow(Record):
    """The epochs of a stage of training, in the order of the run."""

    stage: str
    epochs: list[EpochRow]
