"""Networks whose outputs are maps, boxes or their own input again: one or two blocks of each."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from architectures.classifiers import conv_norm


class DoubleConv(nn.Module):
    """Twice a 3x3 convolution, norm and ReLU."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.double_conv = nn.Sequential(conv_norm(c_in, c_out, 3), conv_norm(c_out, c_out, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.double_conv(x)


class UNet(nn.Module):
    """U-Net (arXiv:1505.04597) of two stages: the lower one grows by repeating pixels, the upper one by a convolution.

    Its output are the logits of each pixel.
    """

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.pool = DoubleConv(3, 8), nn.MaxPool2d(2)
        self.down1, self.down2 = DoubleConv(8, 12), DoubleConv(12, 16)
        self.up1 = DoubleConv(16 + 12, 12)
        self.grow, self.up2 = nn.ConvTranspose2d(12, 8, kernel_size=2, stride=2), DoubleConv(8 + 8, 8)
        self.out = nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x1 = self.enter(x)
        x2 = self.down1(self.pool(x1))
        x3 = self.down2(self.pool(x2))
        x = self.up1(torch.cat([x2, F.interpolate(x3, scale_factor=2, mode="nearest")], dim=1))
        x = self.up2(torch.cat([x1, self.grow(x)], dim=1))
        return self.out(x)


class FeaturePyramid(nn.Module):
    """A backbone of three levels, a feature pyramid (arXiv:1612.03144), one head for all levels (RetinaNet's)."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([conv_norm(3, 8, 3, 2), conv_norm(8, 12, 3, 2), conv_norm(12, 16, 3, 2)])
        self.lateral = nn.ModuleList(nn.Conv2d(c, 8, 1) for c in (8, 12, 16))
        self.smooth = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))
        self.tower = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
        self.classes, self.boxes = nn.Conv2d(8, 6, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> dict[str, list[Tensor]]:
        features = []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        levels = [self.lateral[2](features[2])]
        for i in (1, 0):
            side = self.lateral[i](features[i])
            levels.insert(0, side + F.interpolate(levels[0], size=side.shape[-2:], mode="nearest"))
        towers = [self.tower(smooth(level)) for smooth, level in zip(self.smooth, levels, strict=True)]
        return {"classes": [self.classes(t) for t in towers], "boxes": [self.boxes(t) for t in towers]}


class Bottleneck(nn.Module):
    """YOLO's bottleneck: two 3x3 convolutions and the sum with what came in."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.cv1 = conv_norm(channels, channels, 3, act=nn.SiLU)
        self.cv2 = conv_norm(channels, channels, 3, act=nn.SiLU)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.cv2(self.cv1(x))


class C2f(nn.Module):
    """The block of YOLOv8: half of the channels pass by, the others through bottlenecks, each of which is kept."""

    def __init__(self, c_in: int, c_out: int, n: int) -> None:
        super().__init__()
        c = c_out // 2
        self.cv1 = conv_norm(c_in, 2 * c, act=nn.SiLU)
        self.cv2 = conv_norm((2 + n) * c, c_out, act=nn.SiLU)
        self.m = nn.ModuleList(Bottleneck(c) for _ in range(n))

    def forward(self, x: Tensor) -> Tensor:
        y = list(self.cv1(x).chunk(2, 1))
        y.extend(m(y[-1]) for m in self.m)
        return self.cv2(torch.cat(y, 1))


class SPPF(nn.Module):
    """YOLO's fast spatial pyramid pooling."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.cv1 = conv_norm(c_in, c_in // 2, act=nn.SiLU)
        self.cv2, self.m = conv_norm(c_in * 2, c_out, act=nn.SiLU), nn.MaxPool2d(5, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = [self.cv1(x)]
        y.extend(self.m(y[-1]) for _ in range(3))
        return self.cv2(torch.cat(y, 1))


def yolo() -> nn.Module:
    """A stage of YOLOv8's backbone, and a convolution for boxes."""
    return nn.Sequential(
        conv_norm(3, 8, 3, 2, act=nn.SiLU),
        conv_norm(8, 16, 3, 2, act=nn.SiLU),
        C2f(16, 16, 2),
        SPPF(16, 16),
        nn.Conv2d(16, 12, 1),
    )


class Autoencoder(nn.Module):
    """The dense autoencoder of anomaly detection in MLPerf Tiny (arXiv:2106.07597), narrowed."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [64, 32, 32, 8, 32, 32]
        self.layers = nn.Sequential()
        for c_in, c_out in itertools.pairwise(sizes):
            self.layers.extend([nn.Linear(c_in, c_out), nn.BatchNorm1d(c_out), nn.ReLU()])
        self.out = nn.Linear(32, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.layers(x))
