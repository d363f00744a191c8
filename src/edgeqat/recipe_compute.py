"""The `compute` section of a recipe: what a run works with. It decides how long things take, not what they are."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from edgeqat.recipe_numbers import Positive, Rate
from edgeqat.recipe_quantize import Section

__all__ = ["ComputeSection"]

DAY = 24 * 3600


class ComputeSection(Section):
    """Processes, devices and patience; on other numbers of them float sums end in other last bits, and no more.

    Attributes:
        accelerator: What training runs on; everything else, calibration too, is done on the CPU.
        devices: Processes a node, each with a device or, on CPUs, its share of the threads.
        nodes: Machines, as torchrun has started them.
        strategy: How gradients are brought together, as Lightning Fabric calls it.
        accumulate: Parts into which a process takes its share of a batch, for memory's sake.
        workers: Loader processes of each process; 0 loads between steps.
        timeout: Seconds that a process waits for another, or for a batch, before the run is given up.
        checkpoint_seconds: How often training is checkpointed within an epoch; 0 for after whole epochs alone.
        jobs: Trials of a search, or parts of a sensitivity analysis, at a time; each has its share of the threads.
        jobs_on: Where they run where there are several: processes of this machine, or of a Ray cluster.
    """

    accelerator: Literal["cpu", "gpu", "auto"] = "cpu"
    devices: Positive = 1
    nodes: Positive = 1
    strategy: Literal["auto", "ddp"] = "auto"
    accumulate: Positive = 1
    workers: Annotated[int, Field(ge=0, le=1024)] = 0
    timeout: Annotated[int, Field(ge=1, le=DAY)] = 1800
    checkpoint_seconds: Rate = 600.0
    jobs: Annotated[int, Field(ge=1, le=1024)] = 1
    jobs_on: Literal["processes", "ray"] = "processes"
