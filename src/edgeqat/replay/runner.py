"""What every runtime gives the scripts that run its files."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Call = Callable[[], object]
Start = Callable[[str, int], Callable[[Path, "dict[str, Any]"], Call]]
Run = Callable[[Path, str, "dict[str, Any]", "list[str]", bytes], "tuple[dict[str, Any], dict[str, Any]]"]


@dataclass(frozen=True)
class Runner:
    """One runtime; it is imported when something is run.

    Attributes:
        run: (model file, engine, inputs, names of the outputs, taps) to every output by name, and every inner value
            if there are taps; one thread.
        start: (engine, threads) imports the runtime and gives what loads a model file for some inputs; that gives one
            call and nothing else.
    """

    run: Run
    start: Start


@contextlib.contextmanager
def quiet_runtime() -> Iterator[None]:
    """Within it, what a runtime's own code writes to standard error is lost: files it looks for, delegates it made."""
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
