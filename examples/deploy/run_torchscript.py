"""Classifies an image with an artifact folder for TorchScript.

    python run_torchscript.py FOLDER IMAGE

Needs numpy and torch; edgeqat is not needed on the device.
"""

from pathlib import Path

import numpy as np
import torch
from image import main


def run(model: Path, engine: str, image: np.ndarray) -> np.ndarray:
    """The scores; the engine must be set before the file is loaded, which packs the weights for it."""
    torch.backends.quantized.engine = engine
    module = torch.jit.load(str(model))
    with torch.inference_mode():
        return module(torch.from_numpy(image))[0].numpy()


if __name__ == "__main__":
    main("torchscript", run)
