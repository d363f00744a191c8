"""A command in several processes, started by torchrun or, on one machine, here by what torchrun is made of."""

from __future__ import annotations

import logging
import os
import signal
import sys
import uuid
from collections.abc import Sequence

__all__ = ["is_first", "is_launched", "is_launched_here", "launch"]

HERE = "EDGEQAT_LAUNCHED"

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


def launch(arguments: Sequence[str], processes: int) -> int:
    """Runs `edgeqat` with some arguments in several processes, to their end.

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
    )
    os.environ[HERE] = "1"
    try:
        elastic_launch(config, sys.executable)("-m", "edgeqat", *arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode >= 0:
            return int(failure.exitcode)
        name = signal.Signals(-failure.exitcode).name
        print(
            f"error: process {rank} of the run was ended by {name}; "
            "the same command with --resume goes on from the last checkpoint",
            file=sys.stderr,
        )
        return LOST
    except SignalException:
        return 130
    return 0
