from __future__ import annotations

import torch
from torch import Tensor, nn

import edgeqat as eq
from edgeqat.diagnose.distributions import distributions
from edgeqat.reporting.network import network_rows
from edgeqat.reporting.network_schema import OpRow


class Branches(nn.Module):
    """A sum of two branches, a float op among integers, and logits."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 1), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.one(x))
        x = x + self.two(x)
        x = torch.flip(x, [3])
        return self.head(x.mean((2, 3)))


def rows() -> dict[str, OpRow]:
    x = torch.randn(8, 3, 8, 8)
    sim = eq.calibrate(eq.prepare(Branches().eval(), x), [x])
    program = eq.convert(sim)
    found = network_rows("ptq", program, distributions(sim, x), len(x))
    assert [op.name for op in found.ops] == [op.name for op in program.ops]
    assert (found.variant, found.n) == ("ptq", 8)
    assert {row.name for row in found.distributions if row.part == "weight"} == set(program.consts)
    return {op.name: op for op in found.ops}


def test_ops_read_ops_and_tell_their_grids() -> None:
    found = rows()
    assert found["one"].reads == ["x:quantized"] and found["x:quantized"].reads == []
    assert found["add"].reads == ["one", "two"]
    assert found["one"].fused == "relu" and found["one"].grid_weight == "s8 per-channel"
    assert found["one"].grid_out.startswith("u8 scale")
    assert found["one"].sqnr_db is not None and 20 < found["one"].sqnr_db < 80 and found["one"].clipped == 0.0


def test_a_float_island_says_why() -> None:
    (found,) = (op for op in rows().values() if op.runs == "float")
    assert found.runs == "float" and "flip" in found.kind and found.reason and found.sqnr_db is None
