"""How long set-up takes, and how it grows with depth: prepare, calibrate, convert and lower, each and together.

    python benchmarks/prepare_scale.py [--depths 20 56 110] [--repeats 3] [--threads 2] [--json PATH]

ResNets for CIFAR of these depths at 3x32x32 and, unless `--no-resnet50`, a ResNet-50 (25.6 million parameters) at
3x224x224, all with random weights and one batch of 2 for calibration, so that what is timed is set-up and not data.
Every network is set up from the beginning in each repeat, the networks in turn; a smallest one goes first, untimed,
and pays for imports. Printed: the median of the repeats, with the smallest and largest total; seconds a layer (conv
or linear); and per stage the seconds a layer of the deepest network by those of the shallowest: 1.0 is linear in
depth, below it a fixed part is shared by more layers, above it something grows faster than the network.

The bar: linear in depth, and less than 30 s for ResNet-50 on 2 cores. Run it with nothing else running.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import edgeqat as eq
from common import print_machine
from edgeqat.machine import describe_machine
from edgeqat.zoo.resnet import ResNetCifar

STAGES = ("prepare", "calibrate", "convert", "lower")
BATCH = 2
BAR_S = 30.0
BLOCKS = ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2))
"""(channels inside, blocks, stride of the first) of ResNet-50: He et al. 2015, "Deep Residual Learning", table 1."""
EXPANSION = 4


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 conv, and a shortcut; the 3x3 conv strides."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        out_channels = EXPANSION * channels
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            shortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        """float [N, C_in, H, W] -> [N, 4 * channels, H / stride, W / stride]."""
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        return self.relu(self.bn3(self.conv3(y)) + self.downsample(x))


class ResNet50(nn.Module):
    """float32 images [N, 3, 224, 224] -> logits [N, 1000]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        layers: list[nn.Module] = []
        wide = 64
        for channels, blocks, stride in BLOCKS:
            for block in range(blocks):
                layers.append(Bottleneck(wide, channels, stride if block == 0 else 1))
                wide = EXPANSION * channels
        self.layers = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(wide, 1000)

    def forward(self, x: Tensor) -> Tensor:
        """Computes the logits."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = torch.flatten(self.avgpool(self.layers(x)), 1)
        logits: Tensor = self.fc(x)
        return logits


def resnet_cifar(depth: int) -> nn.Module:
    """A ResNet for CIFAR with `depth` weighted layers."""
    if depth < 8 or (depth - 2) % 6 != 0:
        raise SystemExit(f"found depth {depth}, wanted 6 n + 2, such as 20, 56 or 110")
    return ResNetCifar(blocks=(depth - 2) // 6)


def main() -> None:
    """Prints a line a network, and how the stages grow."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, nargs="+", default=[20, 56, 110])
    parser.add_argument("--no-resnet50", action="store_true")
    parser.add_argument("--target", default="onnxruntime", help="what is planned for and lowered to")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    depths = sorted(set(options.depths))
    networks: dict[str, tuple[Callable[[], nn.Module], int]] = {
        f"ResNet-{depth}, 3x32x32": (partial(resnet_cifar, depth), 32) for depth in depths
    }
    if not options.no_resnet50:
        networks["ResNet-50, 3x224x224"] = (ResNet50, 224)
    print_machine(options.threads)
    print(f"target {options.target}, {options.repeats} repeats", flush=True)
    set_up(resnet_cifar(8), 32, options.target)
    seconds: dict[str, list[dict[str, float]]] = {name: [] for name in networks}
    layers: dict[str, int] = {}
    for _ in range(options.repeats):
        for name, (factory, size) in networks.items():
            torch.manual_seed(0)
            model = factory()
            layers[name] = sum(isinstance(module, nn.Conv2d | nn.Linear) for module in model.modules())
            seconds[name].append(set_up(model, size, options.target))
    medians = {name: report(name, layers[name], runs) for name, runs in seconds.items()}
    growth = report_growth(next(iter(networks)), list(networks)[len(depths) - 1], medians, layers)
    if "ResNet-50, 3x224x224" in medians:
        total = medians["ResNet-50, 3x224x224"]["together"]
        print(f"ResNet-50, 3x224x224: {total:.2f} s, {'below' if total < BAR_S else 'NOT below'} {BAR_S:.0f} s")
    if options.json is not None:
        found: dict[str, Any] = {"machine": describe_machine(options.threads).to_dict(), "target": options.target}
        found |= {"layers": layers, "seconds": seconds, "growth": growth}
        options.json.write_text(json.dumps(found, indent=1))


def set_up(model: nn.Module, size: int, target: str) -> dict[str, float]:
    """Seconds of every stage, and of all of them."""
    x = torch.randn(BATCH, 3, size, size)
    seconds: dict[str, float] = {}
    gc.collect()
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        sim = eq.prepare(model.eval(), x, target)
        prepared = time.perf_counter()
        eq.calibrate(sim, [x])
        calibrated = time.perf_counter()
        program = eq.convert(sim)
        converted = time.perf_counter()
        eq.lower(program, target, Path(folder) / "artifact")
        ends = [prepared, calibrated, converted, time.perf_counter()]
    for stage, start, end in zip(STAGES, [started, *ends], ends, strict=False):
        seconds[stage] = end - start
    return seconds | {"together": ends[-1] - started}


def report(name: str, layers: int, runs: list[dict[str, float]]) -> dict[str, float]:
    """Prints a network's medians; returns them."""
    medians = {stage: statistics.median(run[stage] for run in runs) for stage in (*STAGES, "together")}
    totals = [run["together"] for run in runs]
    stages = ", ".join(f"{stage} {medians[stage]:.2f}" for stage in STAGES)
    print(
        f"{name}: {layers} layers, together {medians['together']:.2f} s ({min(totals):.2f} to {max(totals):.2f}), "
        f"{1e3 * medians['together'] / layers:.1f} ms a layer; {stages} s",
        flush=True,
    )
    return medians


def report_growth(
    shallow: str, deep: str, medians: dict[str, dict[str, float]], layers: dict[str, int]
) -> dict[str, float]:
    """Prints seconds a layer of the deepest by those of the shallowest, per stage; returns them."""
    growth = {
        stage: (medians[deep][stage] / layers[deep]) / (medians[shallow][stage] / layers[shallow])
        for stage in (*STAGES, "together")
    }
    stages = ", ".join(f"{stage} {value:.2f}" for stage, value in growth.items())
    print(f"seconds a layer, {deep} by {shallow}: {stages}", flush=True)
    return growth


if __name__ == "__main__":
    main()
