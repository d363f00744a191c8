from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import edgeqat as eq
from edgeqat.lowering.float_shortcut import with_shortcut_convs

IMAGE = torch.randn(2, 4, 7, 6, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    def __init__(self, every: int, sides: list[int], value: float = 0.0) -> None:
        super().__init__()
        self.every, self.sides, self.value = every, sides, value

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.every, :: self.every], self.sides, value=self.value).relu()


def island(model: nn.Module) -> torch.fx.GraphModule:
    body = eq.convert(eq.prepare(model, IMAGE, qconfig_mapping=eq.QConfigMapping().set_global(None))).ops[0].body
    assert body is not None
    return body


def targets(body: torch.fx.GraphModule) -> list[str]:
    return [str(node.target) for node in body.graph.nodes if node.op == "call_function"]


def test_slices_and_new_channels_are_one_conv_with_the_same_results() -> None:
    for every, sides in ((2, [0, 0, 0, 0, 2, 2]), (3, [0, 0, 0, 0, 0, 5])):
        body = island(Block(every, sides))
        changed = with_shortcut_convs(body)
        assert targets(changed) == ["aten.conv2d.default", "aten.relu.default"]
        assert "aten.conv2d.default" not in targets(body)
        assert torch.equal(changed(IMAGE)[0], body(IMAGE)[0])


def test_all_else_stays_as_it_is() -> None:
    for block in (Block(2, [1, 1, 0, 0, 2, 2]), Block(2, [0, 0, 0, 0, 2, 2], 1.0), Block(1, [0, 0, 0, 0, 2, 2])):
        body = island(block)
        assert with_shortcut_convs(body) is body
