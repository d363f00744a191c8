"""Small models that hold one difficulty each."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def shake(model: nn.Module, seed: int = 0) -> nn.Module:
    """Gives every batch norm statistics and parameters that do something, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            assert module.running_var is not None
            module.running_mean.copy_(torch.randn(module.num_features, generator=generator) * 0.3)
            module.running_var.copy_(torch.rand(module.num_features, generator=generator) * 1.5 + 0.5)
            if module.affine:
                module.weight.data.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
                module.bias.data.copy_(torch.randn(module.num_features, generator=generator) * 0.5)
    return model


class SmallNet(nn.Module):
    """Conv-BN-ReLU, a residual add with ReLU, max pool, slice and pad shortcut, global pool, dropout, linear."""

    def __init__(self, channels: int = 8, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels, eps=1e-3, momentum=0.03)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1)
        self.pool = nn.MaxPool2d(2)
        self.drop = nn.Dropout(0.25)
        self.fc = nn.Linear(2 * channels, classes)
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu_(x + self.bn2(self.conv2(x)))
        side = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.channels // 2, self.channels // 2))
        y = self.conv3(x)
        y += side
        x = self.pool(F.relu6(y))
        x = x.mean((2, 3))
        return self.fc(self.drop(x))


class Branches(nn.Module):
    """Two inputs, a dict of outputs, a module called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Conv2d(3, 4, 3, padding=1)
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, left: Tensor, right: Tensor) -> dict[str, Tensor]:
        both = F.relu(self.shared(left)) + F.relu(self.shared(right))
        return {"sum": both, "map": self.head(both)}


class FloatMiddle(nn.Module):
    """An op without an integer form between two convs."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3)
        self.drop = nn.Dropout(0.5)
        self.last = nn.Conv2d(4, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.sin(self.first(x))
        return self.last(self.drop(x * 2.0))


class FloatBlocks(nn.Module):
    """A float island behind every conv; the islands share a module, and one has two outputs."""

    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(blocks))
        self.gains = nn.ParameterList(nn.Parameter(torch.rand(4, 1, 1) + 0.5) for _ in range(blocks))
        self.norm = nn.GroupNorm(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        for conv, gain in zip(self.convs, self.gains, strict=True):
            left, right = torch.chunk(torch.tanh(conv(x)) * gain, 2, 1)
            x = x + self.norm(torch.cat([right, left], 1))
        return x


class WithConstants(nn.Module):
    """Tensors made in forward, and a view of one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) * torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1, 1) + 0.5


class Tokens(nn.Module):
    """Integer inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.fc = nn.Embedding(10, 8), nn.Linear(8, 4)

    def forward(self, indices: Tensor) -> Tensor:
        return self.fc(self.table(indices).mean(1))


class DataDependent(nn.Module):
    """Cannot be exported."""

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x
        return -x


class FixedBatch(nn.Module):
    """Exports only for the batch of its example."""

    def forward(self, x: Tensor) -> Tensor:
        return x.view(2, -1)
