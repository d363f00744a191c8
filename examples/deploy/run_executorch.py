"""Classifies an image with an artifact folder for ExecuTorch.

    python run_executorch.py FOLDER IMAGE

Needs numpy and executorch, whose Python bindings take torch's tensors.
"""

from pathlib import Path

import numpy as np
import torch
from executorch.runtime import Runtime
from image import main


def run(model: Path, engine: str, image: np.ndarray) -> np.ndarray:
    """The scores."""
    program = Runtime.get().load_program(model)
    return program.load_method("forward").execute([torch.from_numpy(image)])[0].numpy()


if __name__ == "__main__":
    main("executorch", run)
