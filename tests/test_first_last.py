"""First and last layers at 8 bits: their weights and what they read, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import edgeqat as eq
from edgeqat.zoo import mobilenetv2_cifar, resnet8, resnet20
from models import Branches, SmallNet
from own_targets import write_target

FOUR, EIGHT = (eq.QConfig(eq.ActivationConfig(bits=b), eq.WeightConfig(bits=b)) for b in (4, 8))
X = torch.zeros(2, 3, 16, 16)


def mapping() -> eq.QConfigMapping:
    return eq.QConfigMapping().set_global(FOUR).set_first_last(EIGHT)


@pytest.fixture
def target(tmp_path: Path) -> str:
    """One that takes activations of 4 and of 8 bits."""
    return write_target(tmp_path, "activations: {bits: [4, 8]}\nweights: {bits: [4, 8]}")


def weights_at(plan: eq.Plan, bits: int) -> set[str]:
    return {name for name, config in plan.weights.items() if config.bits == bits}


def values_at(plan: eq.Plan, bits: int) -> set[str]:
    """The first values on grids of that width."""
    return {name for name, config in plan.activations.items() if config.bits == bits}


@pytest.mark.parametrize("model", [resnet8, resnet20, mobilenetv2_cifar, SmallNet])
def test_of_the_zoo(model: type[nn.Module], target: str) -> None:
    net = model().eval()
    plan = eq.plan(net, torch.zeros(2, 3, 32, 32), target, mapping())
    (last,) = (name for name, m in net.named_modules() if isinstance(m, nn.Linear))
    first = next(name for name, m in net.named_modules() if isinstance(m, nn.Conv2d))
    assert weights_at(plan, 8) == {f"{first}.weight", f"{last}.weight"}
    ops = {op.name: op for op in plan.program.ops}
    wide = {name for name, value in plan.program.values.items() if value.grid is not None and value.grid.qmax == 255}
    read_by_ends = {ops[first].inputs[0], ops[last].inputs[0]}
    assert read_by_ends <= wide
    grids = {id(plan.program.grid_of(name)) for name in read_by_ends}
    if plan.program.values[last].grid is not None:
        grids.add(id(plan.program.grid_of(last)))  # what the last layer gives
    assert {id(plan.program.grid_of(name)) for name in wide} == grids
    narrow = plan.program.values[first].grid
    assert narrow is not None and narrow.qmax == 15  # what the first layer gives


class Ends(nn.Module):
    """Two inputs, two heads, a conv that reads a padded input, and one layer that is first and last at once."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 3)
        self.middle, self.head = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1)
        self.score, self.short = nn.Conv2d(4, 2, 1), nn.Conv2d(3, 2, 1)

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = F.relu(self.left(a)) + F.relu(self.right(F.pad(b, (1, 1, 1, 1))))
        x = F.relu(self.middle(x))
        return self.head(x), F.max_pool2d(self.score(F.max_pool2d(x, 2)), 2), self.short(a)


def test_several_of_each(target: str) -> None:
    plan = eq.plan(Ends().eval(), (X, X), target, mapping())
    assert weights_at(plan, 4) == {"middle.weight"}
    assert values_at(plan, 4) == {"left", "right", "add"}
    assert values_at(plan, 8) >= {"a:quantized", "middle", "head", "score", "short"}


def test_where_pools_keep_grids_the_value_before_the_pool_is_meant() -> None:
    """Told by the observer, since a runtime that pools so takes 8 bits alone."""
    ends = eq.QConfig(eq.ActivationConfig(observer="minmax"))
    both = eq.QConfigMapping().set_first_last(ends)
    model = resnet8().eval()
    for target in ("torchscript", "onnxruntime"):
        plan = eq.plan(model, torch.zeros(2, 3, 32, 32), target, both)
        (last,) = (op for op in plan.program.ops if op.name == "linear")
        grid = plan.program.grid_of(last.inputs[0])
        owner = next(n for n in plan.activations if plan.program.values[n].grid is grid)
        assert plan.activations[owner].observer == "minmax", (target, owner)
        observers = {n: c.observer for n, c in plan.activations.items()}
        # The image and what the last layer reads; where logits have a grid, these too.
        assert list(observers.values()).count("minmax") == (3 if target == "torchscript" else 2)


def test_rules_that_name_a_layer_win(target: str) -> None:
    five = eq.QConfig(eq.ActivationConfig(bits=8), eq.WeightConfig(bits=8, observer="mse"))
    rules = mapping().set_module_name("conv1", FOUR).set_module_name_regex("f.", five).set_object_type("Conv2d", FOUR)
    plan = eq.plan(SmallNet().eval(), X, target, rules)
    assert plan.weights["conv1.weight"].bits == 4 and plan.weights["fc.weight"].observer == "mse"
    left_out = eq.plan(SmallNet().eval(), X, target, mapping().set_module_name("fc", None))
    assert "fc.weight" not in left_out.weights and left_out.weights["conv1.weight"].bits == 8
    typed = eq.plan(SmallNet().eval(), X, target, mapping().set_object_type("Linear", FOUR))
    assert typed.weights["fc.weight"].bits == 8


def test_without_the_rule_nothing_changes(target: str) -> None:
    plan = eq.plan(SmallNet().eval(), X, target, eq.QConfigMapping().set_global(FOUR))
    again = eq.plan(SmallNet().eval(), X, target, mapping().set_first_last(None))
    assert weights_at(plan, 8) == set() == values_at(plan, 8)
    assert plan.diff(again) == ""


def test_sums_at_8_bits_are_a_rule_for_their_type(target: str) -> None:
    """The residual stream of a network of 4 bits; no rule of its own is wanted."""
    plan = eq.plan(resnet20().eval(), torch.zeros(2, 3, 32, 32), target, mapping().set_object_type(torch.add, EIGHT))
    sums = {op.name for op in plan.program.ops if op.kind.value == "add"}
    assert len(sums) == 9 and sums <= values_at(plan, 8)
    assert len(weights_at(plan, 8)) == 2 and "layer1.0.conv1" in values_at(plan, 4)


def test_what_is_trained_so_runs_so(tmp_path: Path) -> None:
    """W4A8 with learned ranges in the middle, W8A8 at the ends, exact in the runtime."""
    torch.manual_seed(0)
    images = torch.randn(8, 3, 16, 16)
    inner = eq.QConfig(eq.ActivationConfig(learned=True), eq.WeightConfig(bits=4, learned=True))
    rules = eq.QConfigMapping().set_global(inner).set_first_last(eq.QConfig())
    sim = eq.calibrate(eq.prepare(SmallNet().eval(), images, qconfig_mapping=rules), [images])
    eq.fit(sim, [(images, torch.arange(8))], epochs=2, lr=0.01)
    program = eq.convert(sim)
    widths = {name: int(const.data.abs().max()) for name, const in program.consts.items() if const.data is not None}
    assert (
        widths["conv1.weight"] == widths["fc.weight"] == 127 and widths["conv2.weight"] == widths["conv3.weight"] == 7
    )
    artifact = eq.lower(program, "onnxruntime", tmp_path / "a")
    assert eq.verify(artifact, program, [images]).bit_identical == 1.0


def test_several_outputs_of_one_module_called_twice(target: str) -> None:
    plan = eq.plan(Branches().eval(), (X, X), target, mapping())
    assert weights_at(plan, 8) == {"shared.weight", "head.weight"}
