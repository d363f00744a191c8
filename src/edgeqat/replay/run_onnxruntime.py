"""Running ONNX files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from edgeqat.replay.folder import FolderError, reason_of


def run(
    path: Path, engine: str, feed: dict[str, Any], outputs: list[str], taps: bytes
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Every output by name, and every inner value if there are taps; one thread."""
    model = path.read_bytes()
    # The taps turn every integer tensor of the very same file into an output.
    values = _run_onnx(model + taps, feed) if taps else {}
    # int8 activations are stored 128 less.
    return _run_onnx(model, feed), {n: v.view(np.uint8) ^ 128 if v.dtype == np.int8 else v for n, v in values.items()}


def _run_onnx(model: bytes, feed: dict[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        found = session.run(None, feed)
    except Exception as error:
        raise FolderError(f"ONNX Runtime refuses the model: {reason_of(error)}") from error
    return dict(zip((o.name for o in session.get_outputs()), found, strict=True))
