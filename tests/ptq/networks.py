"""Small networks for the aids of post-training quantization, and data for them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import edgeqat as eq
from models import shake

IMAGES = torch.randn(24, 3, 12, 12, generator=torch.Generator().manual_seed(5))
BATCHES = [IMAGES[:16], IMAGES[16:]]


class Chain(nn.Module):
    """Conv, depthwise conv, grouped conv, pool, flatten, two linear layers: every kind of neighbour."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.depthwise, self.norm2 = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8), nn.BatchNorm2d(8)
        self.grouped, self.norm3 = nn.Conv2d(8, 12, (3, 1), dilation=(2, 1), groups=2), nn.BatchNorm2d(12)
        self.fc1, self.fc2 = nn.Linear(12, 16), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.first(x)))
        x = F.relu(self.norm2(self.depthwise(x)))
        x = self.norm3(self.grouped(x))
        x = torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)
        return self.fc2(F.relu(self.fc1(x)))


class Normed(nn.Module):
    """A conv, its batch norm and a ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)))


def uneven(model: nn.Module) -> nn.Module:
    """Statistics as training gives them, and channels of very different ranges."""
    shake(model)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.mul_(10.0 ** torch.linspace(-1, 1, module.num_features))
    return model.eval()


def calibrated(model: nn.Module, bits: int = 4, observer: str = "minmax", **settings: object) -> eq.SimulatedModel:
    """The network with weights of so many bits."""
    weight = eq.WeightConfig(bits=bits, observer=observer, **settings)  # type: ignore[arg-type]
    return eq.calibrate(eq.prepare(model, IMAGES, qconfig_mapping=eq.QConfig(weight=weight)), BATCHES)
