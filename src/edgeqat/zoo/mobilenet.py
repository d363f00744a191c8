"""MobileNetV2 for CIFAR: Sandler et al. 2018, "Inverted Residuals and Linear Bottlenecks", for small images."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgeqat.errors import ModelError

__all__ = ["MobileNetV2", "mobilenetv2_cifar"]

STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),  # stride 2 in the paper, as is the first conv: made for images of 224 pixels, not of 32
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
"""(expansion, channels at width 1, blocks, stride of the first block), the paper's table 2."""


class InvertedResidual(nn.Module):
    """Pointwise expansion, depthwise 3x3, linear pointwise projection; adds its input where the shapes allow."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = in_channels * expansion
        layers: list[nn.Module] = []
        if expansion > 1:
            layers += [nn.Conv2d(in_channels, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6(inplace=True)]
        layers += [
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(inplace=True),
            nn.Conv2d(hidden, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
        ]
        self.conv = nn.Sequential(*layers)
        self.adds_input = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        """float [N, C_in, H, W] -> [N, C_out, H / stride, W / stride]."""
        y: Tensor = self.conv(x)
        return x + y if self.adds_input else y


class MobileNetV2(nn.Module):
    """float32 images [N, 3, 32, 32] -> logits [N, num_classes]; `width` scales every stage's channels."""

    def __init__(self, num_classes: int = 10, width: float = 1.0) -> None:
        super().__init__()
        channels, last = _scaled(32, width), _scaled(1280, width)
        layers: list[nn.Module] = [
            nn.Conv2d(3, channels, 3, 1, 1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU6(inplace=True),
        ]
        for expansion, unscaled, blocks, first_stride in STAGES:
            wanted = _scaled(unscaled, width)
            for block in range(blocks):
                layers.append(InvertedResidual(channels, wanted, first_stride if block == 0 else 1, expansion))
                channels = wanted
        layers += [nn.Conv2d(channels, last, 1, bias=False), nn.BatchNorm2d(last), nn.ReLU6(inplace=True)]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(last, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def forward(self, x: Tensor) -> Tensor:
        """Computes the logits."""
        x = torch.flatten(F.adaptive_avg_pool2d(self.features(x), 1), 1)
        logits: Tensor = self.classifier(x)
        return logits


def _scaled(channels: int, width: float) -> int:
    """The nearest multiple of 8, at least 8."""
    return max(8, (int(width * channels + 4) // 8) * 8)


def mobilenetv2_cifar(num_classes: int = 10, width: float = 0.5) -> MobileNetV2:
    """A freshly initialised MobileNetV2 whose first conv and 24-channel stage keep the resolution.

    Raises:
        ModelError: num_classes is below 1, or width is not a positive number.
    """
    if num_classes < 1:
        raise ModelError(f"num_classes is {num_classes}, wanted at least 1")
    if not (math.isfinite(width) and width > 0):
        raise ModelError(f"width is {width}, wanted a number above 0, such as 0.5")
    return MobileNetV2(num_classes, width)
