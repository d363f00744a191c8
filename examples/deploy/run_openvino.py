"""Classifies an image with an artifact folder for OpenVINO.

    python run_openvino.py FOLDER IMAGE

Needs numpy and openvino; edgeqat and torch are not needed on the device.
"""

from pathlib import Path

import numpy as np
import openvino
from image import main


def run(model: Path, engine: str, image: np.ndarray) -> np.ndarray:
    """The scores; a model of fixed sizes is faster than one of open ones."""
    core = openvino.Core()
    loaded = core.read_model(model)
    loaded.reshape(image.shape)
    # Without the hint OpenVINO computes what is float in bfloat16 on processors that have it.
    return core.compile_model(loaded, engine, {"INFERENCE_PRECISION_HINT": "f32"})([image])[0]


if __name__ == "__main__":
    main("openvino", run)
