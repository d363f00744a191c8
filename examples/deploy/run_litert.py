"""Classifies an image with an artifact folder for LiteRT.

    python run_litert.py FOLDER IMAGE

Needs numpy and ai-edge-litert; edgeqat and torch are not needed on the device.
"""

from pathlib import Path

import numpy as np
from ai_edge_litert.interpreter import Interpreter, OpResolverType
from image import main


def run(model: Path, engine: str, image: np.ndarray) -> np.ndarray:
    """The scores; the file's batch is open, so it is set first."""
    kernels = OpResolverType.BUILTIN if engine == "xnnpack" else OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    interpreter = Interpreter(str(model), experimental_op_resolver_type=kernels)
    place = interpreter.get_input_details()[0]["index"]
    interpreter.resize_tensor_input(place, image.shape)
    interpreter.allocate_tensors()
    interpreter.set_tensor(place, image)
    interpreter.invoke()
    return interpreter.get_tensor(interpreter.get_output_details()[0]["index"])


if __name__ == "__main__":
    main("litert", run)
