"""Loads an artifact's model in a process of its own and prints how many bytes of memory that took.

    python -P memory_probe.py REQUEST < inputs.npz

REQUEST is a JSON object: model (a path), runtime, engine, threads, calls, inputs (names, in the order of the
arrays). Imports the runtime, numpy and the standard library alone, so that nothing else is in the process.
Prints `null` where the system does not tell: no /proc, or a peak that cannot be reset.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Feed = dict[str, np.ndarray[Any, Any]]

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"
"""What Linux takes in clear_refs for: forget the peak resident size (proc(5))."""


def resident() -> tuple[int, int]:
    """(resident bytes now, their peak since it was reset); KeyError where the system does not tell them."""
    fields = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    now, peak = (int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
    return now, peak


def start(runtime: str, engine: str, threads: int) -> Callable[[str, Feed], Callable[[], object]]:
    """Imports a runtime; returns what makes a call of a model file and its inputs.

    Raises:
        KeyError: No such runtime is known here.
    """
    return {"onnxruntime": start_onnxruntime, "torchscript": start_torchscript}[runtime](engine, threads)


def start_onnxruntime(engine: str, threads: int) -> Callable[[str, Feed], Callable[[], object]]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3

    def load(model: str, feed: Feed) -> Callable[[], object]:
        session = onnxruntime.InferenceSession(model, options, providers=[engine])
        return lambda: session.run(None, feed)

    return load


def start_torchscript(engine: str, threads: int) -> Callable[[str, Feed], Callable[[], object]]:
    import torch

    torch.set_num_threads(threads)
    torch.backends.quantized.engine = engine

    def load(model: str, feed: Feed) -> Callable[[], object]:
        module = torch.jit.load(model).eval()  # type: ignore[no-untyped-call]
        inputs = [torch.from_numpy(array) for array in feed.values()]

        def call() -> object:
            with torch.inference_mode():
                return module(*inputs)

        return call

    return load


def probe(request: dict[str, Any], feed: Feed) -> int | None:
    """Peak resident bytes that loading the model and calling it adds to a process that has the runtime loaded."""
    load = start(request["runtime"], request["engine"], request["threads"])
    try:
        CLEAR_REFS.write_text(RESET_PEAK)
        baseline, reset = resident()
    except (OSError, KeyError):
        return None
    call = load(request["model"], feed)
    for _ in range(request["calls"]):
        call()
    _, peak = resident()
    # Where the peak was not reset it may be that of importing the runtime; then it tells nothing.
    return max(peak - baseline, 0) if peak > reset or reset <= baseline else None


def main() -> None:
    request = json.loads(sys.argv[1])
    with np.load(io.BytesIO(sys.stdin.buffer.read()), allow_pickle=False) as arrays:
        feed = {name: arrays[f"arr_{i}"] for i, name in enumerate(request["inputs"])}
    print(json.dumps(probe(request, feed)))


if __name__ == "__main__":
    main()
