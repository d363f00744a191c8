"""ResNets for images of 32 pixels.

ResNet-20 for CIFAR: He et al. 2015, "Deep Residual Learning for Image Recognition", section 4.2.
ResNet-8 of MLPerf Tiny: the image classification reference model of Banbury et al. 2021.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgeqat.errors import ModelError

__all__ = ["ResNet8", "ResNetCifar", "resnet8", "resnet20"]


class BasicBlock(nn.Module):
    """Two 3x3 convs and a parameter-free shortcut (the paper's option A).

    Where the block widens, the shortcut takes every second pixel and pads the new channels with zeros, half
    of them in front.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.stride = stride
        self.new_channels = out_channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        """float [N, C_in, H, W] -> [N, C_out, H / stride, W / stride]."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.stride != 1 or self.new_channels != 0:
            front = self.new_channels // 2
            x = x[:, :, :: self.stride, :: self.stride]
            x = F.pad(x, (0, 0, 0, 0, front, self.new_channels - front))
        return F.relu(y + x)


class ResNetCifar(nn.Module):
    """float32 images [N, 3, 32, 32] -> logits [N, num_classes]; three stages of `blocks` basic blocks."""

    def __init__(self, blocks: int, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(blocks, 16, 16, stride=1)
        self.layer2 = _stage(blocks, 16, 32, stride=2)
        self.layer3 = _stage(blocks, 32, 64, stride=2)
        self.linear = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Computes the logits."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        x = torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)
        logits: Tensor = self.linear(x)
        return logits


def _stage(blocks: int, in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    """A first block that may widen and stride, then blocks of one shape."""
    rest = [BasicBlock(out_channels, out_channels, 1) for _ in range(blocks - 1)]
    return nn.Sequential(BasicBlock(in_channels, out_channels, stride), *rest)


def resnet20(num_classes: int = 10) -> ResNetCifar:
    """A freshly initialised ResNet-20.

    Raises:
        ModelError: num_classes is below 1.
    """
    _check_classes(num_classes)
    return ResNetCifar(blocks=3, num_classes=num_classes)


class ProjectionBlock(nn.Module):
    """Two 3x3 convs and, where the block strides, a 1x1 conv as shortcut.

    All convs have biases, and the shortcut has no batch norm, as in the reference implementation.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Identity() if stride == 1 else nn.Conv2d(in_channels, out_channels, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """float [N, C_in, H, W] -> [N, C_out, H / stride, W / stride]."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(self.shortcut(x) + y)


class ResNet8(nn.Module):
    """float32 images [N, 3, 32, 32] -> logits [N, num_classes].

    The layers of the MLPerf Tiny reference model. Its strided 3x3 convs pad after the image only, as Keras'
    "same" does; these pad on all sides.
    """

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1)
        self.bn1 = nn.BatchNorm2d(16)
        self.block1 = ProjectionBlock(16, 16, stride=1)
        self.block2 = ProjectionBlock(16, 32, stride=2)
        self.block3 = ProjectionBlock(32, 64, stride=2)
        self.linear = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)
                assert module.bias is not None
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Computes the logits."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.block3(self.block2(self.block1(x)))
        x = torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)
        logits: Tensor = self.linear(x)
        return logits


def resnet8(num_classes: int = 10) -> ResNet8:
    """A freshly initialised ResNet-8.

    Raises:
        ModelError: num_classes is below 1.
    """
    _check_classes(num_classes)
    return ResNet8(num_classes)


def _check_classes(num_classes: int) -> None:
    if num_classes < 1:
        raise ModelError(f"num_classes is {num_classes}, wanted at least 1")
