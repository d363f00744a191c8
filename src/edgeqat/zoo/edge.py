"""EdgeModel: a small CNN with one inverted residual that adds and one that halves the resolution.

`EdgeModelWithStubs` is as people write it for eager-mode torch.ao, with stubs and a FloatFunctional;
`EdgeModel` is the same network with a plain `+`. Their parameters have the same names, so a state dict of one
loads into the other.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.ao.nn.quantized import FloatFunctional
from torch.ao.quantization import DeQuantStub, QuantStub

from edgeqat.errors import ModelError

__all__ = ["EdgeModel", "EdgeModelWithStubs", "edge_model", "edge_model_with_stubs"]


class ConvBnRelu(nn.Sequential):
    """conv, batch norm, ReLU."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, padding: int = 0
    ) -> None:
        super().__init__(
            nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        )


def _expand_filter_project(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    """Pointwise expansion by two, depthwise 3x3, linear pointwise projection."""
    hidden_dim = in_channels * 2
    return nn.Sequential(
        nn.Conv2d(in_channels, hidden_dim, 1, 1, 0, bias=False),
        nn.BatchNorm2d(hidden_dim),
        nn.ReLU(inplace=True),
        nn.Conv2d(hidden_dim, hidden_dim, 3, stride, 1, groups=hidden_dim, bias=False),
        nn.BatchNorm2d(hidden_dim),
        nn.ReLU(inplace=True),
        nn.Conv2d(hidden_dim, out_channels, 1, 1, 0, bias=False),
        nn.BatchNorm2d(out_channels),
    )


class InvertedResidual(nn.Module):
    """An inverted residual; it adds its input when the shapes allow."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.use_res_connect = stride == 1 and in_channels == out_channels
        self.conv = _expand_filter_project(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """float [N, C_in, H, W] -> [N, C_out, H / stride, W / stride]."""
        y: Tensor = self.conv(x)
        return x + y if self.use_res_connect else y


class InvertedResidualWithStubs(nn.Module):
    """`InvertedResidual` whose addition is a module that eager-mode quantization can observe."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.use_res_connect = stride == 1 and in_channels == out_channels
        self.conv = _expand_filter_project(in_channels, out_channels, stride)
        self.skip_add = FloatFunctional()

    def forward(self, x: Tensor) -> Tensor:
        """float [N, C_in, H, W] -> [N, C_out, H / stride, W / stride]."""
        y: Tensor = self.conv(x)
        return self.skip_add.add(x, y) if self.use_res_connect else y


class EdgeModel(nn.Module):
    """float32 images [N, 3, H, W] -> logits [N, num_classes]."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.entry_block = ConvBnRelu(3, 32, 3, stride=2, padding=1)
        self.residual_block = InvertedResidual(32, 32, 1)
        self.downsample_block = InvertedResidual(32, 64, 2)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Computes the logits."""
        x = self.entry_block(x)
        x = self.residual_block(x)
        x = self.downsample_block(x)
        x = self.avgpool(x)
        x = torch.flatten(x, 1)
        logits: Tensor = self.fc(x)
        return logits


class EdgeModelWithStubs(nn.Module):
    """`EdgeModel` between a QuantStub and a DeQuantStub."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.quant = QuantStub()
        self.entry_block = ConvBnRelu(3, 32, 3, stride=2, padding=1)
        self.residual_block = InvertedResidualWithStubs(32, 32, 1)
        self.downsample_block = InvertedResidualWithStubs(32, 64, 2)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(64, num_classes)
        self.dequant = DeQuantStub()

    def forward(self, x: Tensor) -> Tensor:
        """Computes the logits."""
        x = self.quant(x)
        x = self.entry_block(x)
        x = self.residual_block(x)
        x = self.downsample_block(x)
        x = self.avgpool(x)
        x = torch.flatten(x, 1)
        x = self.fc(x)
        logits: Tensor = self.dequant(x)
        return logits


def edge_model(num_classes: int = 10) -> EdgeModel:
    """A freshly initialised `EdgeModel`.

    Raises:
        ModelError: num_classes is below 1.
    """
    _check_classes(num_classes)
    return EdgeModel(num_classes)


def edge_model_with_stubs(num_classes: int = 10) -> EdgeModelWithStubs:
    """A freshly initialised `EdgeModelWithStubs`.

    Raises:
        ModelError: num_classes is below 1.
    """
    _check_classes(num_classes)
    return EdgeModelWithStubs(num_classes)


def _check_classes(num_classes: int) -> None:
    if num_classes < 1:
        raise ModelError(f"num_classes is {num_classes}, wanted at least 1")
