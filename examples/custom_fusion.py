"""Custom fusion: which modules become one, from lists of their names and from patterns of blocks.

    python examples/custom_fusion.py

1. Explicit lists, as for torch's fuse_modules. edgeqat finds conv, batch norm and ReLU inside any container by
   itself; a list only checks that they were fused, and says why if not.
2. Patterns. A block of several integer ops (SiLU is a table and a product) keeps a grid for each inner value, but runs
   in integers as a whole or stays in float as a whole, with one QConfig.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import edgeqat as eq
from edgeqat.zoo import edge_model

# The containers ConvBnRelu and InvertedResidual of edge_model hold these.
ARTICLE = [
    ["entry_block.0", "entry_block.1", "entry_block.2"],
    ["residual_block.conv.0", "residual_block.conv.1", "residual_block.conv.2"],
    ["residual_block.conv.3", "residual_block.conv.4", "residual_block.conv.5"],
    ["residual_block.conv.6", "residual_block.conv.7"],
    ["downsample_block.conv.0", "downsample_block.conv.1", "downsample_block.conv.2"],
    ["downsample_block.conv.3", "downsample_block.conv.4", "downsample_block.conv.5"],
    ["downsample_block.conv.6", "downsample_block.conv.7"],
]


class SqueezeExcite(nn.Module):
    """Scales each channel by what a small network makes of the averages of all."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.reduce, self.act = nn.Conv2d(channels, channels // 4, 1), nn.SiLU()
        self.expand = nn.Conv2d(channels // 4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """float [N, C, H, W] to the same."""
        return x * torch.sigmoid(self.expand(self.act(self.reduce(self.pool(x)))))


def conv_bn_silu(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """A conv, its batch norm and SiLU."""
    conv = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.SiLU())


def network() -> nn.Sequential:
    """float images [N, 3, H, W] to 10 logits."""
    body = [conv_bn_silu(3, 16, 2), SqueezeExcite(16), conv_bn_silu(16, 32, 2), SqueezeExcite(32)]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def wide_enough(match: eq.FusionMatch) -> str:
    """A check: "" accepts a match, any other text refuses it and stands in the plan."""
    channels = match.outputs[0][1]
    return "" if isinstance(channels, int) and channels >= 32 else f"{channels} channels, wanted 32 or more"


PATTERNS = [
    eq.FusionPattern("conv-bn-silu", ops=("conv2d", "batch_norm", "silu")),
    eq.FusionPattern("squeeze-excite", modules=SqueezeExcite, check=wide_enough),
]


def main() -> None:
    """Prints both plans, and trains the second network for a step."""
    torch.manual_seed(0)
    images = torch.randn(8, 3, 32, 32)
    print(eq.plan(edge_model(), images, fusions=ARTICLE), end="\n\n")

    sim = eq.prepare(network(), images, fusions=PATTERNS)
    print(sim.plan, end="\n\n")
    eq.calibrate(sim, [images])
    eq.fit(sim, [(images, torch.arange(8))], epochs=1, lr=0.01)
    program = eq.convert(sim)
    print(f"converted: {len(program.integer_ops())} integer ops, {len(program.float_origins())} in float")

    # One rule steers a whole block.
    float_blocks = eq.QConfigMapping().set_object_type(SqueezeExcite, None)
    planned = eq.plan(network(), images, qconfig_mapping=float_blocks, fusions=PATTERNS)
    print(f"with squeeze-excite in float: {sum(row.runs == 'float' for row in planned.rows())} ops in float")


if __name__ == "__main__":
    main()
