"""A command in several processes, started by torchrun or, on one machine, here by what torchrun is made of."""

from __future__ import annotations

import logging
import os
import signal
import sys
import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

__all__ = ["is_first", "is_launched", "is_launched_here", "launch", "processes_here"]

HERE = "EDGEQAT_LAUNCHED"

LEAST_PATIENCE = 5
MOMENT = 1
"""Seconds; the launcher notes whole ones."""

LOST = 5
"""The exit code of a run that lost a process, see errors.py."""


def is_launched() -> bool:
    """Whether this process is one of those that torchrun has started."""
    return "LOCAL_RANK" in os.environ and "WORLD_SIZE" in os.environ


def is_first() -> bool:
    """Whether this process is the one that tells the user, if there are others."""
    return not is_launched() or os.environ.get("RANK", "0") == "0"


def is_launched_here() -> bool:
    """Whether `launch` has started this process, and tells of those that are killed."""
    return HERE in os.environ


def processes_here() -> int:
    """How many processes of a run share this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if is_launched() else 1


def launch(arguments: Sequence[str], processes: int, patience: int) -> int:
    """Runs `edgeqat` with some arguments in several processes, to their end.

    Args:
        arguments: Of the command.
        processes: How many.
        patience: Seconds that they have to end once they are asked to.

    Returns:
        The exit code of the first process that failed, 0 where none did, 130 where they were stopped. A process that
        was killed ends the others, and is told of here where it cannot have done so itself.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.disable(logging.ERROR)  # this process does nothing else, and what it finds is told in a line
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.2,
        shutdown_timeout=max(patience, LEAST_PATIENCE),
    )
    # As the script `edgeqat` they import nothing from the working directory.
    os.environ |= {HERE: "1", "PYTHONSAFEPATH": "1"}
    try:
        elastic_launch(config, sys.executable)("-m", "edgeqat", *arguments)
    except ChildFailedError as error:
        rank, code = _first(error)
        if code >= 0 and (code != LOST or rank == 0):  # it has told of it
            return code
        what = "does not answer" if code >= 0 else f"was ended by {signal.Signals(-code).name}"
        print(
            f"error: process {rank if code < 0 else 0} of the run {what}; "
            "the same command with --resume goes on from the last checkpoint",
            file=sys.stderr,
        )
        return LOST
    except SignalException:
        return 130
    return 0


def _first(error: ChildFailedError) -> tuple[int, int]:
    """The process that failed first and its exit code; of those that did in the same moment, one that was killed.

    The launcher's own signals come later: SIGTERM to all that are left, SIGKILL to who does not heed it.
    """
    failures = sorted(error.failures.items(), key=lambda item: (item[1].timestamp, item[0]))
    begun = failures[0][1].timestamp
    codes = [(rank, int(failure.exitcode)) for rank, failure in failures if failure.timestamp <= begun + MOMENT]
    return min(codes, key=lambda found: (found[1] == -signal.SIGTERM, found[1] >= 0))
