"""The processes of one run: this one by itself, or those that torchrun or `edgeqat run` has started, on Fabric."""

from __future__ import annotations

import gc
import logging
import os
import signal
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

import torch.distributed as dist

from edgeqat.errors import EdgeqatError, InputError, RecipeError
from edgeqat.launch import is_launched
from edgeqat.ranks import ALONE, Ranks
from edgeqat.recipe_compute import ComputeSection

if TYPE_CHECKING:
    from lightning_fabric import Fabric

__all__ = ["Team", "check_alone", "team_of"]


@dataclass(frozen=True, eq=False)
class Team:
    """Who works on a run: the processes, and Fabric where there are several or another device than the CPU."""

    ranks: Ranks = ALONE
    fabric: Fabric | None = None


def check_alone(compute: ComputeSection, what: str) -> None:
    """Refuses several processes, and other devices than the CPU, for what works in one process on the CPU.

    Raises:
        RecipeError: The recipe, or torchrun, wants them.
    """
    several = int(os.environ["WORLD_SIZE"]) if is_launched() else compute.devices * compute.nodes
    if several > 1 or compute.accelerator == "gpu":
        wanted = f"{several} processes" if several > 1 else "compute.accelerator gpu"
        raise RecipeError(
            f"found {wanted}, and {what} works in one process on the CPU; set compute.devices to 1 and "
            "compute.accelerator to cpu, and train the recipe that it leads to with more"
        )


@contextmanager
def team_of(compute: ComputeSection) -> Iterator[Team]:
    """The processes of a run, connected within it.

    Their number is torchrun's where it has started this one, whatever the recipe says.

    Raises:
        RecipeError: The recipe wants several processes, and this one was started by itself.
        InputError: There is no such device.
    """
    devices, nodes = compute.devices, compute.nodes
    if is_launched():
        devices = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        nodes = int(os.environ["WORLD_SIZE"]) // devices
    elif devices * nodes > 1:
        raise RecipeError(
            f"found compute.devices {devices} and compute.nodes {nodes}, wanted as many processes: start them with "
            "`edgeqat run` on one machine, or `torchrun -m edgeqat run` on each"
        )
    if devices * nodes == 1 and compute.accelerator == "cpu" and compute.strategy == "auto":
        yield Team()
        return
    theirs = dist.is_initialized()
    fabric = _launched(compute, devices, nodes)
    try:
        yield Team(Ranks() if fabric.world_size > 1 else ALONE, fabric)
    except BaseException as error:
        _ignore_sigterm()
        _let_go(error)
        if isinstance(error, EdgeqatError) and error.told is None:
            error.told = False  # this process's own
        raise
    finally:
        if dist.is_initialized() and not theirs:
            # A DistributedDataParallel that is collected later would end the group's threads while it holds Python's
            # lock, for which one of them may wait: a deadlock.
            gc.collect()
            dist.destroy_process_group()


def _ignore_sigterm() -> None:
    """A process that an error ends is told to end by the launcher too, wherever it then is."""
    if is_launched() and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _let_go(error: BaseException | None) -> None:
    """Clears the frames that an error came through, which hold what trained in them."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _launched(compute: ComputeSection, devices: int, nodes: int) -> Fabric:
    from lightning_fabric import Fabric  # a second, which one process on the CPU can spare
    from lightning_fabric.strategies.ddp import DDPStrategy

    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    strategy: str | DDPStrategy = "auto"
    if devices * nodes > 1 or compute.strategy == "ddp":
        strategy = DDPStrategy(timeout=timedelta(seconds=compute.timeout), forward_sync_buffers=False)
    try:
        fabric = Fabric(accelerator=compute.accelerator, strategy=strategy, devices=devices, num_nodes=nodes)
        fabric.launch()
    except (RuntimeError, ValueError) as error:  # MisconfigurationException is no class of its own
        raise InputError(f"compute: {(str(error).splitlines() or [type(error).__name__])[0]}") from error
    return fabric
