"""Classifies an image with an artifact folder for ONNX Runtime.

    python run_onnxruntime.py FOLDER IMAGE

Needs numpy and onnxruntime; edgeqat and torch are not needed on the device.
"""

from pathlib import Path

import numpy as np
import onnxruntime
from image import main


def run(model: Path, engine: str, image: np.ndarray) -> np.ndarray:
    """The scores."""
    session = onnxruntime.InferenceSession(model, providers=[engine])
    return session.run(None, {session.get_inputs()[0].name: image})[0]


if __name__ == "__main__":
    main("onnxruntime", run)
