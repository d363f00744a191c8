"""Every form of a model that quantization must take, whole: prepared, calibrated, trained a step, converted, lowered,
verified on its runtime, and given back in float. Each returns its own structure everywhere."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import edgeqat as eq
from edgeqat.errors import CaptureError
from edgeqat.signature import Batch, call
from helpers import EXACT_ARITHMETIC
from models import Branches, Tokens, shake

GENERATOR = torch.Generator().manual_seed(0)
IMAGE = torch.randn(4, 3, 8, 8, generator=GENERATOR)
INDICES = torch.randint(0, 10, (4, 6), generator=GENERATOR)
TYPES = torch.randint(0, 2, (4, 6), generator=GENERATOR)


class TwoHeads(nn.Module):
    """A conv, and two values to return."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 2, 1)

    def both(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = F.relu(self.body(x))
        return features, self.head(features)


class NestedTuple(TwoHeads):
    def forward(self, x: Tensor) -> tuple[Tensor, tuple[list[Tensor], Tensor]]:
        a, b = self.both(x)
        return b, ([a, b], a)


class NestedDict(TwoHeads):
    def forward(self, x: Tensor) -> dict[str, Any]:
        a, b = self.both(x)
        return {"map": b, "inside": {"z": a, "a": b}}  # keys in no order


Scored = namedtuple("Scored", ["scores", "features"])


class NamedTuple(TwoHeads):
    def forward(self, x: Tensor) -> Scored:
        a, b = self.both(x)
        return Scored(scores=b, features=a)


@dataclass
class Registered:
    scores: Tensor
    features: Tensor


torch.export.register_dataclass(Registered)


class RegisteredDataclass(TwoHeads):
    def forward(self, x: Tensor) -> Registered:
        a, b = self.both(x)
        return Registered(scores=b, features=a)


@dataclass(frozen=True)
class Inner:
    features: Tensor


@dataclass(frozen=True)
class Plain:
    scores: Tensor
    inner: tuple[Inner, Tensor]


class PlainDataclass(TwoHeads):
    """torch.export does not know what it returns, and nobody has told it."""

    def forward(self, x: Tensor) -> Plain:
        a, b = self.both(x)
        return Plain(b, (Inner(a), a))


class SeveralInputs(nn.Module):
    """Inputs in a list and in a dict, one of them by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, pair: list[Tensor], more: dict[str, Tensor], *, bias: Tensor) -> Tensor:
        return self.conv(pair[0]) + self.conv(pair[1] * more["gain"]) + bias


class CalledTwice(nn.Module):
    """A conv with its batch norm, and a linear, each called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = F.relu(self.norm(self.conv(x)))
        x = x.mean((2, 3)).repeat(1, 3)[:, :8]
        return self.fc(F.relu(self.fc(x)))


class TiedEmbedding(nn.Module):
    """The table that looks indices up is the last layer's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.body, self.head = nn.Embedding(10, 8), nn.Linear(8, 8), nn.Linear(8, 10, bias=False)
        self.head.weight = self.table.weight

    def forward(self, indices: Tensor) -> Tensor:
        return self.head(F.relu(self.body(self.table(indices).mean(1))))


class TiedConvs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.relu(self.first(x)))


class Frozen(nn.Module):
    """A frozen conv with its batch norm, a layer with a frozen weight alone, and one that is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.mixed, self.head = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1)
        self.conv.requires_grad_(False)
        self.norm.requires_grad_(False)
        self.mixed.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.mixed(F.relu(self.norm(self.conv(x))))))


class Buffers(nn.Module):
    """Buffers of both kinds, and an attribute, in arithmetic."""

    gain: Tensor
    shift: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.factor = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1), 0.7
        self.register_buffer("gain", torch.rand(4, 1, 1) + 0.5)
        self.register_buffer("shift", torch.rand(4, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x) * self.gain + self.shift * self.factor)


class TokenTypes(nn.Module):
    """Integer inputs, one of them left out at times, and a mask of booleans."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.types, self.norm = nn.Embedding(10, 8), nn.Embedding(2, 8), nn.LayerNorm(8)
        self.positions, self.fc = nn.Parameter(torch.randn(6, 8)), nn.Linear(8, 4)

    def forward(self, indices: Tensor, types: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        x = self.words(indices) + self.positions
        x = self.norm(x if types is None else x + self.types(types))
        return self.fc((x if mask is None else x * mask.unsqueeze(-1)).mean(1))


class BranchesOnShapes(nn.Module):
    """Control flow that the example decides: the size of a dimension, the number of dimensions, a loop over one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.pool, self.fc = nn.Conv2d(3, 4, 1), nn.MaxPool2d(2), nn.Linear(4 * 4 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        while x.shape[-1] > 4:
            x = self.pool(x)
        assert x.dim() == 4
        return self.fc(x.flatten(1) if x.shape[2] == x.shape[3] else x.mean((2, 3)))


@dataclass(frozen=True)
class Case:
    """A model and an example batch; `exact`: no float op is upstream of an output, so that every bit is owed."""

    model: type[nn.Module]
    batch: Batch
    exact: bool = True
    unused: tuple[str, ...] = field(default=())


CASES = {
    "two inputs, a dict, a module called twice": Case(Branches, (IMAGE, IMAGE + 1)),
    "the same by keyword": Case(Branches, {"right": IMAGE, "left": IMAGE + 1}),
    "inputs in a list and a dict": Case(
        SeveralInputs, {"pair": [IMAGE, -IMAGE], "more": {"gain": IMAGE[:, :1]}, "bias": IMAGE[:, :1]}, exact=False
    ),
    "nested tuple": Case(NestedTuple, IMAGE),
    "nested dict": Case(NestedDict, IMAGE),
    "named tuple": Case(NamedTuple, IMAGE),
    "registered dataclass": Case(RegisteredDataclass, IMAGE),
    "plain dataclass": Case(PlainDataclass, IMAGE),
    "called twice": Case(CalledTwice, IMAGE, exact=False),
    "tied convs": Case(TiedConvs, IMAGE),
    "tied embedding": Case(TiedEmbedding, INDICES, exact=False),
    "frozen": Case(Frozen, IMAGE),
    "buffers": Case(Buffers, IMAGE, exact=False),
    "indices": Case(Tokens, INDICES, exact=False),
    "indices and types": Case(TokenTypes, (INDICES, TYPES), exact=False),
    "indices and a mask": Case(TokenTypes, {"indices": INDICES, "mask": TYPES.bool()}, exact=False, unused=("types",)),
    "branches on shapes": Case(BranchesOnShapes, IMAGE),
}
RUNTIMES = [pytest.param("onnxruntime", marks=EXACT_ARITHMETIC), "torchscript"]


def first_n(batch: Batch, n: int) -> Batch:
    """The first n samples."""
    found: Batch = pytree.tree_map(lambda tensor: tensor[:n], batch)
    return found


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_from_the_float_model_to_its_runtime_and_back(case: Case, runtime: str, tmp_path: Path) -> None:
    model = shake(case.model().eval())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    sim = eq.calibrate(eq.prepare(model, case.batch, target=runtime), [case.batch])
    structure = pytree.tree_structure(call(model, case.batch))  # prepare has made a plain dataclass known
    assert structure.num_leaves == len(sim.plan.program.outputs)
    _train_a_step(sim, case, frozen)
    program = eq.convert(sim.eval())
    assert program.integer_ops()
    artifact = eq.lower(program, runtime, tmp_path / "artifact")
    for n in (1, 3, 4):
        part = first_n(case.batch, n)
        for outputs in (sim.call(part), eq.reference(program, part, runtime), artifact.run(part)):
            assert pytree.tree_structure(outputs) == structure
            assert [t.shape for t in pytree.tree_leaves(outputs)] == [
                t.shape for t in pytree.tree_leaves(call(model, part))
            ]
    parity = eq.verify(artifact, program, [case.batch])
    assert parity.max_error_steps == 0.0
    assert not case.exact or parity.bit_identical == 1.0
    back = sim.to_float()
    assert type(back) is case.model
    assert pytree.tree_structure(call(back, case.batch)) == structure
    assert {name for name, p in back.named_parameters() if not p.requires_grad} == frozen
    state = back.state_dict()
    assert state.keys() == before.keys()
    assert all(torch.allclose(state[name], before[name], rtol=1e-5, atol=1e-6) for name in frozen)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def _train_a_step(sim: eq.SimulatedModel, case: Case, frozen: set[str]) -> None:
    """SGD on every output; what is to be trained has a gradient and moves, what is frozen does not."""
    parameters = {name: p for name, p in sim.named_parameters() if not name.startswith(("quantizers.", *case.unused))}
    before = {name: p.detach().clone() for name, p in parameters.items()}
    known = {name for name, _ in sim.fused.captured.template.named_parameters()}
    optimizer = torch.optim.SGD([p for p in parameters.values() if p.requires_grad], lr=0.01)
    sum((t * t).mean() for t in pytree.tree_leaves(sim.train().call(case.batch))).backward()
    optimizer.step()
    for name, parameter in parameters.items():
        assert torch.equal(parameter, before[name]) is not parameter.requires_grad, name
        # A folded conv's new bias is trained if its batch norm is.
        assert parameter.requires_grad is (name not in frozen) or name not in known, name


def test_tied_weights_are_one_tensor_in_the_simulation_and_back_in_float() -> None:
    for case, names in (("tied convs", ("first", "second")), ("tied embedding", ("table", "head"))):
        sim = eq.prepare(CASES[case].model(), CASES[case].batch)
        for module in (sim, sim.to_float()):
            one, other = (module.get_parameter(f"{name}.weight") for name in names)
            assert one is other, case


class Unknown:
    """A class of a user's own that holds a tensor."""

    def __init__(self, scores: Tensor) -> None:
        self.scores = scores


@dataclass
class Derived:
    """A dataclass that its fields alone do not make."""

    scores: Tensor
    best: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.best = self.scores.amax(1)


class Returns(nn.Module):
    def __init__(self, kind: type) -> None:
        super().__init__()
        self.conv, self.kind = nn.Conv2d(3, 4, 1), kind

    def forward(self, x: Tensor) -> Any:
        return self.kind(self.conv(x))


@pytest.mark.parametrize("kind", [Unknown, Derived])
def test_an_output_whose_tensors_cannot_be_found_is_refused_with_what_to_do(kind: type) -> None:
    with pytest.raises(CaptureError) as refused:
        eq.prepare(Returns(kind), IMAGE)
    assert str(refused.value) == (
        f"Returns cannot be captured: it returns a {kind.__name__}, whose tensors torch.export cannot find; return "
        "tensors, tuples, lists, dicts or dataclasses, or register it with torch.utils._pytree.register_pytree_node"
    )


class WithNone(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor | None]:
        return {"scores": F.relu(x), "loss": None}


def test_an_output_that_is_no_tensor_is_refused() -> None:
    with pytest.raises(
        CaptureError, match="^found the constant None among the outputs, wanted tensors only: leave it"
    ):
        eq.prepare(WithNone(), IMAGE)
