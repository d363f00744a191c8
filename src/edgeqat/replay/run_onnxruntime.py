"""Running ONNX files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from edgeqat.replay.folder import FolderError, reason_of
from edgeqat.replay.runner import Call


def run(
    path: Path, engine: str, feed: dict[str, Any], outputs: list[str], taps: bytes
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Every output by name, and every inner value if there are taps; one thread."""
    model = path.read_bytes()
    # The taps turn every integer tensor of the very same file into an output.
    values = _run_onnx(model + taps, feed) if taps else {}
    # int8 activations are stored 128 less.
    return _run_onnx(model, feed), {n: v.view(np.uint8) ^ 128 if v.dtype == np.int8 else v for n, v in values.items()}


def start(engine: str, threads: int) -> Callable[[Path, dict[str, Any]], Call]:
    """Imports ONNX Runtime; returns what makes a call of a model file and its inputs."""
    import onnxruntime  # noqa: F401

    def load(model: Path, feed: dict[str, Any]) -> Call:
        session = _session(model.read_bytes(), threads)
        return lambda: session.run(None, feed)

    return load


def _session(model: bytes, threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        # The runtime has a dozen exception classes for a file it does not take; all mean the same here.
        raise FolderError(f"ONNX Runtime refuses the model: {reason_of(error)}") from error


def _run_onnx(model: bytes, feed: dict[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
    session = _session(model, 1)
    try:
        found = session.run(None, feed)
    except Exception as error:
        raise FolderError(f"ONNX Runtime refuses the model: {reason_of(error)}") from error
    return dict(zip((o.name for o in session.get_outputs()), found, strict=True))
