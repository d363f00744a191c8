"""Loads an artifact's model in a process of its own and prints how many bytes of memory that took.

    python -P -c SCRIPT REQUEST < inputs.npz

SCRIPT is `edgeqat.replay.script.probe_script(runtime)`. REQUEST is a JSON object: model (a path), engine, threads,
calls, inputs (names, in the order of the arrays). Imports the runtime, numpy and the standard library alone, so that
nothing else is in the process.
Prints `null` where the system does not tell: no /proc, or a peak that cannot be reset.
"""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from edgeqat.replay.runner import Start

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"
"""What Linux takes in clear_refs for: forget the peak resident size (proc(5))."""


def resident() -> tuple[int, int]:
    """(resident bytes now, their peak since it was reset); KeyError where the system does not tell them."""
    fields = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    now, peak = (int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
    return now, peak


def probe(start: Start, request: dict[str, Any], feed: dict[str, Any]) -> int | None:
    """Peak resident bytes that loading the model and calling it adds to a process that has the runtime loaded."""
    load = start(request["engine"], request["threads"])
    try:
        CLEAR_REFS.write_text(RESET_PEAK)
        baseline, reset = resident()
    except (OSError, KeyError):
        return None
    call = load(Path(request["model"]), feed)
    for _ in range(request["calls"]):
        call()
    _, peak = resident()
    # Where the peak was not reset it may be that of importing the runtime; then it tells nothing.
    return max(peak - baseline, 0) if peak > reset or reset <= baseline else None


def probe_main(start: Start) -> None:
    """The command line of the probe."""
    request = json.loads(sys.argv[1])
    with np.load(io.BytesIO(sys.stdin.buffer.read()), allow_pickle=False) as arrays:
        feed = {name: arrays[f"arr_{i}"] for i, name in enumerate(request["inputs"])}
    print(json.dumps(probe(start, request, feed)))
