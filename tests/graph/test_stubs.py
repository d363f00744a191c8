from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.ao.quantization import DeQuantStub, QuantStub

from edgeqat.graph.capture import capture
from edgeqat.planning import plan
from edgeqat.program import Kind
from edgeqat.zoo import edge_model, edge_model_with_stubs

IMAGE = torch.zeros(2, 3, 8, 8)


class Bounded(nn.Module):
    """The stubs leave the first and the last conv in float."""

    def __init__(self) -> None:
        super().__init__()
        self.quant, self.dequant = QuantStub(), DeQuantStub()
        self.before, self.inside, self.after = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.dequant(self.inside(self.quant(self.before(x)))))


def test_only_what_stands_between_the_stubs_is_quantized() -> None:
    planned = plan(Bounded(), IMAGE)
    convs = [op for op in planned.program.ops if op.kind is Kind.CONV]
    assert [op.name for op in convs] == ["inside"]
    reasons = {o.module: o.reason for o in planned.program.float_origins()}
    assert reasons == {"before": "it stands before the QuantStub", "after": "it stands after the DeQuantStub"}


def test_the_marks_vanish() -> None:
    captured = capture(Bounded(), IMAGE)
    assert not any("stub" in str(node.target) for node in captured.graph.nodes)
    assert set(captured.outside.values()) == {"it stands before the QuantStub", "it stands after the DeQuantStub"}


def test_stubs_around_the_whole_model_give_the_plan_of_none() -> None:
    image = torch.zeros(1, 3, 32, 32)
    with_stubs, plain = plan(edge_model_with_stubs(), image), plan(edge_model(), image)
    assert with_stubs.program.plan_hash == plain.program.plan_hash
    assert [(op.kind, op.inputs, op.outputs, op.attrs) for op in with_stubs.program.ops] == [
        (op.kind, op.inputs, op.outputs, op.attrs) for op in plain.program.ops
    ]
