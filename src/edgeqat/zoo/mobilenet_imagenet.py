"""MobileNetV2 for images of 224 pixels: the network of mobilenet.py with the paper's strides.

Parameters have the names of torchvision's mobilenet_v2, so that its weights load as they are.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgeqat.errors import ModelError

__all__ = ["MobileNetV2ImageNet", "mobilenetv2_imagenet"]

STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
"""(expansion, channels at width 1, blocks, stride of the first block), the paper's table 2."""


class ConvBlock(nn.Sequential):
    """Convolution, batch norm, ReLU6."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        conv = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False)
        super().__init__(conv, nn.BatchNorm2d(out_channels), nn.ReLU6(inplace=True))


class InvertedBlock(nn.Module):
    """Pointwise expansion, depthwise 3x3, linear pointwise projection; adds its input where the shapes allow."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = in_channels * expansion
        expand = [ConvBlock(in_channels, hidden, 1)] if expansion > 1 else []
        depthwise = ConvBlock(hidden, hidden, 3, stride, groups=hidden)
        project = nn.Conv2d(hidden, out_channels, 1, bias=False)
        self.conv = nn.Sequential(*expand, depthwise, project, nn.BatchNorm2d(out_channels))
        self.adds_input = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        """float [N, C_in, H, W] -> [N, C_out, H / stride, W / stride]."""
        y: Tensor = self.conv(x)
        return x + y if self.adds_input else y


class MobileNetV2ImageNet(nn.Module):
    """float32 images [N, 3, 224, 224] -> logits [N, num_classes]; `width` scales every stage's channels."""

    def __init__(self, num_classes: int = 1000, width: float = 1.0, dropout: float = 0.2) -> None:
        super().__init__()
        channels, last = _scaled(32, width), _scaled(1280, max(1.0, width))
        layers: list[nn.Module] = [ConvBlock(3, channels, 3, 2)]
        for expansion, unscaled, blocks, first_stride in STAGES:
            wanted = _scaled(unscaled, width)
            for block in range(blocks):
                layers.append(InvertedBlock(channels, wanted, first_stride if block == 0 else 1, expansion))
                channels = wanted
        layers.append(ConvBlock(channels, last, 1))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(last, num_classes))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def forward(self, x: Tensor) -> Tensor:
        """Computes the logits."""
        x = torch.flatten(F.adaptive_avg_pool2d(self.features(x), 1), 1)
        logits: Tensor = self.classifier(x)
        return logits


def _scaled(channels: int, width: float) -> int:
    """The nearest multiple of 8, at least 8, but never more than a tenth below."""
    nearest = max(8, int(width * channels + 4) // 8 * 8)
    return nearest if nearest >= 0.9 * width * channels else nearest + 8


def mobilenetv2_imagenet(num_classes: int = 1000, width: float = 1.0, dropout: float = 0.2) -> MobileNetV2ImageNet:
    """A freshly initialised MobileNetV2 with the strides and the parameter names of torchvision's.

    Raises:
        ModelError: num_classes is below 1, width is not a positive number, or dropout is not in 0..1.
    """
    if num_classes < 1:
        raise ModelError(f"num_classes is {num_classes}, wanted at least 1")
    if not (math.isfinite(width) and width > 0):
        raise ModelError(f"width is {width}, wanted a number above 0, such as 1.0")
    if not 0 <= dropout < 1:
        raise ModelError(f"dropout is {dropout}, wanted 0 to below 1")
    return MobileNetV2ImageNet(num_classes, width, dropout)
