"""Networks of compound blocks, as their authors write them, and what re-parameterises one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgeqat.graph.fold_bn import folded_parameters


class SqueezeExcite(nn.Module):
    """Scales each channel by what a small network makes of the averages of all."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduce, self.act = nn.Conv2d(channels, channels // 2, 1), nn.SiLU()
        self.expand = nn.Conv2d(channels // 2, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] to the same."""
        return x * torch.sigmoid(self.expand(self.act(self.reduce(F.adaptive_avg_pool2d(x, 1)))))


class ConvBnSilu(nn.Sequential):
    """As YOLO and EfficientNet have it."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.SiLU(True))


class RepBlock(nn.Module):
    """RepVGG's block (Ding et al., 2021): a 3x3 and a 1x1 conv and the identity, each with its batch norm."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.wide, self.wide_bn = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.narrow, self.narrow_bn = nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels)
        self.identity_bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] to the same."""
        return F.relu(self.wide_bn(self.wide(x)) + self.narrow_bn(self.narrow(x)) + self.identity_bn(x))


def one_conv(block: nn.Module) -> nn.Module:
    """The conv and ReLU that a RepBlock is in eval mode."""
    assert isinstance(block, RepBlock)
    channels = block.wide.out_channels
    same = torch.eye(channels).reshape(channels, channels, 1, 1)
    kernels = [block.wide.weight, F.pad(block.narrow.weight, (1, 1, 1, 1)), F.pad(same, (1, 1, 1, 1))]
    norms = [block.wide_bn, block.narrow_bn, block.identity_bn]
    folded = [folded_parameters(kernel, None, norm) for kernel, norm in zip(kernels, norms, strict=True)]
    conv = nn.Conv2d(channels, channels, 3, padding=1)
    with torch.no_grad():
        conv.weight.copy_(sum(weight for weight, _ in folded))
        conv.bias.copy_(sum(bias for _, bias in folded))  # type: ignore[union-attr]
    return nn.Sequential(conv, nn.ReLU())


class HardBlock(nn.Module):
    """conv, batch norm, hardswish, the last as a function."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] to [N, C', H, W]."""
        return F.hardswish(self.bn(self.conv(x)))


class SineBlock(nn.Module):
    """A conv on either side of an op without an integer form."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] to the same."""
        return self.last(torch.sin(self.first(x)))


class Blocks(nn.Module):
    """A stem, blocks, a head."""

    def __init__(self, *blocks: nn.Module, channels: int = 8) -> None:
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(3, channels, 3, padding=1), nn.Sequential(*blocks)
        self.head = nn.Linear(channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, H, W] to [N, 5]."""
        return self.head(self.blocks(F.relu(self.stem(x))).mean((2, 3)))
