"""Convolutional classifiers: one or two blocks of each, as their authors write them in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv_norm(
    c_in: int, c_out: int, kernel: int = 1, stride: int = 1, groups: int = 1, act: type[nn.Module] | None = nn.ReLU
) -> nn.Sequential:
    """A convolution that keeps the image's size but for its stride, a batch norm, an activation."""
    conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(c_out), *([] if act is None else [act()]))


class SqueezeExcite(nn.Module):
    """Squeeze-and-excitation (arXiv:1709.01507) with convolutions."""

    def __init__(self, channels: int, squeezed: int, act: type[nn.Module], gate: type[nn.Module]) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc1, self.fc2 = nn.Conv2d(channels, squeezed, 1), nn.Conv2d(squeezed, channels, 1)
        self.act, self.gate = act(), gate()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.fc2(self.act(self.fc1(self.pool(x)))))


class Classifier(nn.Module):
    """Features, global pooling, dropout, a linear layer."""

    def __init__(self, *features: nn.Module, channels: int, classes: int = 10) -> None:
        super().__init__()
        self.features, self.pool = nn.Sequential(*features), nn.AdaptiveAvgPool2d(1)
        self.head = nn.Sequential(nn.Dropout(0.2), nn.Linear(channels, classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.flatten(self.pool(self.features(x)), 1))


class InvertedResidual(nn.Module):
    """The block of MobileNetV2 (arXiv:1801.04381), MobileNetV3 (1905.02244) and EfficientNet (1905.11946)."""

    def __init__(
        self, c_in: int, c_out: int, expand: int, kernel: int, stride: int, act: type[nn.Module], *middle: nn.Module
    ) -> None:
        super().__init__()
        hidden = c_in * expand
        self.block = nn.Sequential(
            conv_norm(c_in, hidden, act=act),
            conv_norm(hidden, hidden, kernel, stride, groups=hidden, act=act),
            *middle,
            conv_norm(hidden, c_out, act=None),
        )
        self.residual = stride == 1 and c_in == c_out

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x) if self.residual else self.block(x)


def mobilenet_v2() -> nn.Module:
    return Classifier(
        conv_norm(3, 8, 3, 2, act=nn.ReLU6),
        InvertedResidual(8, 8, 6, 3, 1, nn.ReLU6),
        InvertedResidual(8, 12, 6, 3, 2, nn.ReLU6),
        conv_norm(12, 32, act=nn.ReLU6),
        channels=32,
    )


def mobilenet_v3() -> nn.Module:
    return Classifier(
        conv_norm(3, 8, 3, 2, act=nn.Hardswish),
        InvertedResidual(8, 8, 3, 5, 1, nn.ReLU, SqueezeExcite(24, 8, nn.ReLU, nn.Hardsigmoid)),
        InvertedResidual(8, 12, 4, 3, 2, nn.Hardswish, SqueezeExcite(32, 8, nn.ReLU, nn.Hardsigmoid)),
        conv_norm(12, 32, act=nn.Hardswish),
        channels=32,
    )


def efficientnet() -> nn.Module:
    # The squeeze has a quarter of the block's input channels, not of the expanded ones.
    return Classifier(
        conv_norm(3, 8, 3, 2, act=nn.SiLU),
        InvertedResidual(8, 8, 6, 3, 1, nn.SiLU, SqueezeExcite(48, 2, nn.SiLU, nn.Sigmoid)),
        InvertedResidual(8, 12, 6, 5, 2, nn.SiLU, SqueezeExcite(48, 2, nn.SiLU, nn.Sigmoid)),
        conv_norm(12, 32, act=nn.SiLU),
        channels=32,
    )


class ShuffleUnit(nn.Module):
    """The unit of ShuffleNetV2 (arXiv:1807.11164)."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        half = c_out // 2
        self.side = (
            nn.Sequential(conv_norm(c_in, c_in, 3, 2, groups=c_in, act=None), conv_norm(c_in, half))
            if stride == 2
            else None
        )
        self.main = nn.Sequential(
            conv_norm(c_in if stride == 2 else half, half),
            conv_norm(half, half, 3, stride, groups=half, act=None),
            conv_norm(half, half),
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.side is not None:
            out = torch.cat((self.side(x), self.main(x)), dim=1)
        else:
            kept, worked = x.chunk(2, dim=1)
            out = torch.cat((kept, self.main(worked)), dim=1)
        n, c, h, w = out.size()
        return torch.transpose(out.view(n, 2, c // 2, h, w), 1, 2).contiguous().view(n, c, h, w)


def shufflenet_v2() -> nn.Module:
    stem = nn.Sequential(conv_norm(3, 8, 3, 2), nn.MaxPool2d(3, 2, 1))
    return Classifier(stem, ShuffleUnit(8, 16, 2), ShuffleUnit(16, 16, 1), conv_norm(16, 32), channels=32)


class DenseLayer(nn.Module):
    """The layer of DenseNet-B (arXiv:1608.06993): norm and ReLU stand before each convolution."""

    def __init__(self, c_in: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(c_in), nn.Conv2d(c_in, 4 * growth, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(4 * growth), nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, features: list[Tensor]) -> Tensor:
        x = self.conv1(F.relu(self.norm1(torch.cat(features, 1)), inplace=True))
        return self.conv2(F.relu(self.norm2(x), inplace=True))


class DenseNet(nn.Module):
    """A dense block, a transition, the last norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_norm(3, 8, 3, 2)
        self.layers = nn.ModuleList(DenseLayer(8 + 4 * i, 4) for i in range(3))
        self.transition = nn.Sequential(
            nn.BatchNorm2d(20), nn.ReLU(inplace=True), nn.Conv2d(20, 10, 1, bias=False), nn.AvgPool2d(2, 2)
        )
        self.norm, self.fc = nn.BatchNorm2d(10), nn.Linear(10, 10)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for layer in self.layers:
            features.append(layer(features))
        x = F.relu(self.norm(self.transition(torch.cat(features, 1))), inplace=True)
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, (1, 1)), 1))


class InceptionA(nn.Module):
    """InceptionA of Inception v3 (arXiv:1512.00567)."""

    def __init__(self, c_in: int, pooled: int) -> None:
        super().__init__()
        self.branch1 = conv_norm(c_in, 8)
        self.branch5 = nn.Sequential(conv_norm(c_in, 6), conv_norm(6, 8, 5))
        self.branch3 = nn.Sequential(conv_norm(c_in, 8), conv_norm(8, 12, 3), conv_norm(12, 12, 3))
        self.branch_pool = conv_norm(c_in, pooled)

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.branch_pool(F.avg_pool2d(x, kernel_size=3, stride=1, padding=1))
        return torch.cat([self.branch1(x), self.branch5(x), self.branch3(x), pooled], 1)


class InceptionB(nn.Module):
    """InceptionB: it halves the image."""

    def __init__(self, c_in: int) -> None:
        super().__init__()
        self.branch3 = conv_norm(c_in, 12, 3, 2)
        self.stack = nn.Sequential(conv_norm(c_in, 8), conv_norm(8, 12, 3), conv_norm(12, 12, 3, 2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.branch3(x), self.stack(x), F.max_pool2d(x, 3, 2, 1)], 1)


def inception() -> nn.Module:
    return Classifier(conv_norm(3, 8, 3, 2), InceptionA(8, 8), InceptionB(36), channels=60)


class Fire(nn.Module):
    """The fire module of SqueezeNet (arXiv:1602.07360)."""

    def __init__(self, c_in: int, squeezed: int, expanded: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(c_in, squeezed, 1)
        self.expand1, self.expand3 = nn.Conv2d(squeezed, expanded, 1), nn.Conv2d(squeezed, expanded, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.squeeze(x))
        return torch.cat([F.relu(self.expand1(x)), F.relu(self.expand3(x))], 1)


class SqueezeNet(nn.Module):
    """It classifies with a convolution, a ReLU and global pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2, ceil_mode=True),
            Fire(8, 4, 8),
            Fire(16, 4, 8),
        )
        self.classifier = nn.Sequential(
            nn.Dropout(0.5), nn.Conv2d(16, 10, 1), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d((1, 1))
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.flatten(self.classifier(self.features(x)), 1)


class RegNetBlock(nn.Module):
    """The bottleneck of RegNetX and, with squeeze-and-excitation, RegNetY (arXiv:2003.13678)."""

    def __init__(self, c_in: int, c_out: int, stride: int, width: int, squeeze: bool) -> None:
        super().__init__()
        # The squeeze has a quarter of the block's input channels.
        excite = [SqueezeExcite(c_out, c_in // 4, nn.ReLU, nn.Sigmoid)] if squeeze else []
        self.f = nn.Sequential(
            conv_norm(c_in, c_out),
            conv_norm(c_out, c_out, 3, stride, groups=c_out // width),
            *excite,
            conv_norm(c_out, c_out, act=None),
        )
        self.proj = conv_norm(c_in, c_out, 1, stride, act=None) if stride != 1 or c_in != c_out else nn.Identity()
        self.activation = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.proj(x) + self.f(x))


def regnet_x() -> nn.Module:
    return Classifier(
        conv_norm(3, 8, 3, 2), RegNetBlock(8, 16, 2, 8, False), RegNetBlock(16, 16, 1, 8, False), channels=16
    )


def regnet_y() -> nn.Module:
    return Classifier(
        conv_norm(3, 8, 3, 2), RegNetBlock(8, 16, 2, 8, True), RegNetBlock(16, 16, 1, 8, True), channels=16
    )


class RepVGGBlock(nn.Module):
    """The block of RepVGG (arXiv:2101.03697) as it is trained: 3x3, 1x1 and a batch norm on its own."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.dense = conv_norm(c_in, c_out, 3, stride, act=None)
        self.point = conv_norm(c_in, c_out, 1, stride, act=None)
        self.identity = nn.BatchNorm2d(c_in) if c_in == c_out and stride == 1 else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.dense(x) + self.point(x)
        return F.relu(out if self.identity is None else out + self.identity(x))


def repvgg() -> nn.Module:
    return Classifier(RepVGGBlock(3, 8, 2), RepVGGBlock(8, 8, 1), RepVGGBlock(8, 16, 2), channels=16)


class GhostModule(nn.Module):
    """The ghost module (arXiv:1911.11907): half of its channels are made from the other half, cheaply."""

    def __init__(self, c_in: int, c_out: int, relu: bool) -> None:
        super().__init__()
        self.c_out, half, act = c_out, -(-c_out // 2), nn.ReLU if relu else None
        self.primary = conv_norm(c_in, half, act=act)
        self.cheap = conv_norm(half, half, 3, groups=half, act=act)

    def forward(self, x: Tensor) -> Tensor:
        x1 = self.primary(x)
        return torch.cat([x1, self.cheap(x1)], dim=1)[:, : self.c_out, :, :]


class GhostBottleneck(nn.Module):
    """Two ghost modules, a depthwise convolution where it halves the image, squeeze-and-excitation."""

    def __init__(self, c_in: int, hidden: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.ghost1, self.ghost2 = GhostModule(c_in, hidden, True), GhostModule(hidden, c_out, False)
        self.down = conv_norm(hidden, hidden, 3, stride, groups=hidden, act=None) if stride > 1 else nn.Identity()
        self.se = SqueezeExcite(hidden, hidden // 4, nn.ReLU, nn.Hardsigmoid)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or c_in != c_out:
            self.shortcut = nn.Sequential(
                conv_norm(c_in, c_in, 3, stride, groups=c_in, act=None), conv_norm(c_in, c_out, act=None)
            )

    def forward(self, x: Tensor) -> Tensor:
        return self.ghost2(self.se(self.down(self.ghost1(x)))) + self.shortcut(x)


def ghostnet() -> nn.Module:
    return Classifier(conv_norm(3, 8, 3, 2), GhostBottleneck(8, 24, 8, 1), GhostBottleneck(8, 24, 13, 2), channels=13)


class SeparableConv1d(nn.Module):
    """A depthwise and a pointwise convolution over time, each with norm and ReLU."""

    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv1d(c_in, c_in, kernel, stride, kernel // 2, groups=c_in, bias=False)
        self.pointwise = nn.Conv1d(c_in, c_out, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm1d(c_in), nn.BatchNorm1d(c_out)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.depthwise(x)))
        return F.relu(self.norm2(self.pointwise(x)))


class KeywordSpotter(nn.Module):
    """A DS-CNN (arXiv:1711.07128) over time: the coefficients of each frame are its channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv1d(10, 16, 5, 2, 2, bias=False), nn.BatchNorm1d(16), nn.ReLU())
        self.blocks = nn.Sequential(SeparableConv1d(16, 16, 3, 1), SeparableConv1d(16, 24, 3, 2))
        self.pool, self.drop, self.fc = nn.AvgPool1d(4), nn.Dropout(0.2), nn.Linear(48, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.drop(self.pool(self.blocks(self.stem(x))).flatten(1)))
