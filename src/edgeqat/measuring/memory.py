"""Peak memory: what loading and running an artifact adds to a process that has nothing but its runtime."""

from __future__ import annotations

import io
import json
import statistics
import subprocess
import sys

import numpy as np

from edgeqat.errors import EdgeqatError
from edgeqat.lowering.artifact import Artifact
from edgeqat.lowering.golden import golden_inputs
from edgeqat.replay.script import probe_script

__all__ = ["peak_memory"]

PROCESSES = 3
CALLS = 20


def peak_memory(artifact: Artifact, threads: int = 1) -> int | None:
    """Peak resident memory that loading an artifact and calling it at batch 1 adds, in bytes.

    Each measurement is a fresh process that imports the runtime and numpy alone: its resident size after the
    imports is the baseline, and the peak is read after loading the model and some calls. The runtime's own code
    and its arena count as far as the artifact makes them grow.

    Args:
        artifact: An artifact on disk.
        threads: Threads within an op.

    Returns:
        The median of some processes; None where the system does not tell (it needs Linux' /proc).

    Raises:
        TamperedError: The golden vectors, whose first sample is the input, cannot be read.
        EdgeqatError: The process failed.
    """
    found = [_measure_once(artifact, threads) for _ in range(PROCESSES)]
    told = [peak for peak in found if peak is not None]
    return int(statistics.median(told)) if len(told) == len(found) else None


def _measure_once(artifact: Artifact, threads: int) -> int | None:
    feed = golden_inputs(artifact.folder, artifact.manifest, 1)
    request = {
        "model": str(artifact.path.resolve()),
        "engine": artifact.manifest["engine"],
        "threads": threads,
        "calls": CALLS,
        "inputs": list(feed),
    }
    inputs = io.BytesIO()
    np.savez(inputs, *feed.values())  # by position: savez takes names as keywords, and "file" is one of its own
    # -P: this package's own folder must not stand in the path, where its modules would hide others.
    command = [sys.executable, "-P", "-c", probe_script(artifact.runtime), json.dumps(request)]
    ended = subprocess.run(command, input=inputs.getvalue(), capture_output=True)
    if ended.returncode != 0:
        lines = ended.stderr.decode(errors="replace").strip().splitlines() or ["it printed nothing"]
        raise EdgeqatError(
            f"measuring the memory of {artifact.folder} failed with exit code {ended.returncode}: {lines[-1]}"
        )
    peak = json.loads(ended.stdout)
    return None if peak is None else int(peak)
