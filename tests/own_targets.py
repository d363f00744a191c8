"""Files of targets of one's own, and models prepared for them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

import edgeqat as eq


def write_target(folder: Path, text: str = "", name: str = "my-npu") -> str:
    """The path of a target file with these lines behind its name."""
    path = folder / f"{name}.yaml"
    path.write_text(f"name: {name}\n{text}")
    return str(path)


def converted_for(target: str, model: nn.Module, x: Tensor, scale: float = 1.0) -> eq.QuantizedProgram:
    """The program of a model whose weights are multiplied by `scale`, calibrated on x."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    return eq.convert(eq.calibrate(eq.prepare(model.eval(), x, target=target), [x]))


def is_power_of_two(scale: Tensor) -> bool:
    """Whether each scale is 2**k for an integer k, exactly."""
    return bool((torch.frexp(scale)[0] == 0.5).all())
