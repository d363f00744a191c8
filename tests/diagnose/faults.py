"""A small classifier that works, and the two faults that are planted in it."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import edgeqat as eq
from edgeqat.data.batches import Batches
from edgeqat.data.dataset import Dataset, Split
from edgeqat.data.sources import load

OUTLIER = 1000.0
SATURATING = {"module": "conv1", "activations": {"observer": "percentile", "observer_args": {"percentile": 50.5}}}
"""An override that leaves almost nothing of a layer's range."""


class Digits(nn.Module):
    """float32 [N, 3, 8, 8] -> logits [N, 10]; four convs, an addition around the second."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 16, 3, padding=1)
        self.conv3 = nn.Conv2d(16, 16, 3, padding=1)
        self.conv4 = nn.Conv2d(16, 16, 3, padding=1)
        self.fc = nn.Linear(16 * 4, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x))
        x = F.relu(self.conv2(x)) + x
        x = F.relu(self.conv4(F.relu(self.conv3(x))))
        x = F.max_pool2d(x, 4)
        return self.fc(torch.flatten(x, 1))


@functools.cache
def digits() -> Dataset:
    return load("digits", image_size=8, mean=None, std=None, calibration_n=128, needs_labels=True)


def batches(split: Split) -> Batches:
    return Batches(split, batch_size=128, mean=digits().mean, std=digits().std)


@functools.cache
def _trained() -> nn.Module:
    torch.manual_seed(0)
    model, data = Digits(), digits()
    train = Batches(data.train, batch_size=32, mean=data.mean, std=data.std, shuffle=True)
    eq.fit(model, train, epochs=8, lr=0.03)
    return model.eval()


def trained() -> nn.Module:
    """The classifier; a copy."""
    return copy.deepcopy(_trained())


def with_outlier(model: nn.Module, before: str = "conv3", after: str = "conv4") -> nn.Module:
    """Scales one channel between two layers by 1000 and undoes it in the next: the float function stays."""
    with torch.no_grad():
        for parameter in (model.get_parameter(f"{before}.weight"), model.get_parameter(f"{before}.bias")):
            parameter[0] *= OUTLIER
        model.get_parameter(f"{after}.weight")[:, 0] /= OUTLIER
    return model


def find(
    model: nn.Module, max_drop: float, overrides: Sequence[dict[str, Any]] = (), batch_norm: str = "fold", **more: Any
) -> eq.SearchResult:
    """A search on the validation samples. With live batch norms, though there are none, nothing is equalized."""
    data = digits()
    quantize = {"overrides": list(overrides), "batch_norm": batch_norm}
    held_out = batches(data.validation)
    limits = eq.Limits(max_drop=max_drop)
    return eq.search(model, batches(data.calibration).inputs(), held_out, limits=limits, quantize=quantize, **more)
