"""Switches: what is on and off computes what it should, forks compute what whole runs do, and no trace is left."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import closing
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import edgeqat as eq
from edgeqat.diagnose.forks import Forks
from edgeqat.diagnose.switches import evaluating, quantizing, switchable
from edgeqat.diagnose.units import units_of
from edgeqat.errors import InputError, PhaseError
from models import Branches, FloatBlocks, FloatMiddle, SmallNet, WithConstants, shake

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
MAPS = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(1))
PIXELS = torch.randint(0, 256, (4, 3, 8, 8), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
MINMAX = eq.QConfig(eq.ActivationConfig(observer="minmax"))
LEARNED = eq.QConfig(eq.ActivationConfig(learned=True), eq.WeightConfig(learned=True))


class Scaled(nn.Module):
    """A parameter that values are multiplied with, which is an operand with a grid of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.gain = nn.Conv2d(3, 4, 3), nn.Parameter(torch.rand(4, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) * self.gain


class InPlace(nn.Module):
    """Writes into its input."""

    def forward(self, x: Tensor) -> Tensor:
        return x.add_(1.0)


class WithInPlace(nn.Module):
    """What an opaque module wrote into is read by a conv behind it, and nobody else."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.odd, self.last = nn.Conv2d(3, 4, 3), InPlace(), nn.Conv2d(4, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.odd(self.first(x) * 2.0))


CASES: dict[str, Callable[[], tuple[eq.SimulatedModel, Any]]] = {
    "folded": lambda: (eq.prepare(shake(SmallNet()).eval(), IMAGES), IMAGES),
    "live": lambda: (eq.prepare(shake(SmallNet()).eval(), IMAGES, batch_norm="live"), IMAGES),
    "learned": lambda: (eq.prepare(shake(SmallNet()).eval(), IMAGES, qconfig_mapping=LEARNED), IMAGES),
    "portable": lambda: (eq.prepare(shake(SmallNet()).eval(), IMAGES, "portable"), IMAGES),
    "shared module": lambda: (eq.prepare(Branches(), (IMAGES, IMAGES)), (IMAGES, -IMAGES)),
    "float middle": lambda: (eq.prepare(FloatMiddle().eval(), IMAGES), IMAGES),
    "float blocks": lambda: (eq.prepare(FloatBlocks().eval(), MAPS), MAPS),
    "constants": lambda: (eq.prepare(WithConstants(), IMAGES), IMAGES),
    "operand": lambda: (eq.prepare(Scaled(), IMAGES), IMAGES),
    "in place": lambda: (eq.prepare(WithInPlace(), IMAGES, opaque=["odd"]), IMAGES),
    "pixels": lambda: (
        eq.prepare(shake(SmallNet()).eval(), PIXELS, pixels=eq.Pixels((0.5,) * 3, (0.25,) * 3)),
        PIXELS,
    ),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[eq.SimulatedModel, Any]:
    sim, batch = CASES[request.param]()
    return eq.calibrate(sim, [batch]).eval(), batch


def leaves(outputs: Any) -> list[Tensor]:
    return [leaf.detach() for leaf in pytree.tree_leaves(outputs)]


def equal(one: Any, other: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(leaves(one), leaves(other), strict=True))


def state(sim: eq.SimulatedModel) -> tuple[Any, ...]:
    """All that a caller could notice."""
    modes = [getattr(module, "mode", None) for module in sim.modules()]
    training = [module.training for module in sim.modules()]
    tensors = {name: tensor.clone() for name, tensor in sim.state_dict().items()}
    hooks = [len(module._forward_hooks) for module in sim.modules()]
    return sim.phase, modes, training, hooks, tensors


def same_state(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    return one[:-1] == other[:-1] and all(torch.equal(one[-1][name], other[-1][name]) for name in one[-1])


def cloned(batch: Any) -> Any:
    return pytree.tree_map_only(Tensor, Tensor.clone, batch)


def test_with_nothing_on_it_is_the_float_model_and_with_everything_the_quantized_one(
    case: tuple[eq.SimulatedModel, Any],
) -> None:
    sim, batch = case
    in_float = copy.deepcopy(sim)
    in_float.set_phase("float")
    with quantizing(sim, ()):
        assert equal(sim.call(batch), in_float.call(batch))
    quantized = sim.call(batch)
    with quantizing(sim, switchable(sim)):
        assert equal(sim.call(batch), quantized)
    assert not equal(quantized, in_float.call(batch))


def test_the_units_have_every_switch_between_them_and_each_changes_something(
    case: tuple[eq.SimulatedModel, Any],
) -> None:
    sim, batch = case
    units = units_of(sim)
    whole = [name for unit in units if unit.part in ("layer", "value") for name in unit.quantizers]
    assert sorted(whole) == sorted(switchable(sim))
    with quantizing(sim, ()):
        reference = sim.call(batch)
    unchanged = set()
    for unit in units:
        with quantizing(sim, unit.quantizers):
            if equal(sim.call(batch), reference):
                unchanged.add(unit.name)
    assert unchanged <= {"view:quantized"}  # 1, 2 and 3 are on the grid that ends at 3


def test_forks_give_the_bits_of_whole_runs(case: tuple[eq.SimulatedModel, Any]) -> None:
    sim, batch = case
    before = state(sim)
    every = switchable(sim)
    own = [frozenset(unit.quantizers) for unit in units_of(sim)]
    with evaluating(sim):
        for base in (frozenset[str](), every):
            settings = [*own, *(every - names for names in own), frozenset[str](), every]
            found = dict(Forks(sim).run(cloned(batch), base, settings))
            assert len(found) == len(settings)
            for index, names in enumerate(settings):
                with quantizing(sim, names):
                    assert equal(found[index], sim.call(cloned(batch))), names
    assert same_state(before, state(sim))


def test_every_switch_is_put_back(case: tuple[eq.SimulatedModel, Any]) -> None:
    sim, batch = case
    sim.train()
    next(iter(sim.children())).eval()  # a part that is not trained stays so
    before = state(sim)
    with pytest.raises(ZeroDivisionError), evaluating(sim), quantizing(sim, ()):
        sim.call(batch)
        raise ZeroDivisionError
    assert same_state(before, state(sim))
    with evaluating(sim), closing(Forks(sim).run(batch, switchable(sim), [frozenset()])) as runs:
        next(runs)  # and no further
    assert same_state(before, state(sim))


def test_an_operand_keeps_the_grid_that_it_had() -> None:
    """Its grid follows the parameter in every run; but a look changes nothing."""
    sim = eq.calibrate(eq.prepare(Scaled(), IMAGES), [IMAGES])
    sim.get_parameter("gain").data.mul_(2)
    before = state(sim)
    with evaluating(sim):
        sim(IMAGES)
        assert not same_state(before, state(sim))
    sim.train()
    assert same_state(before, state(sim))


def test_a_bias_is_rounded_where_input_and_weight_are_quantized_and_nowhere_else() -> None:
    layer = nn.Linear(2, 1)
    layer.weight.data.copy_(torch.tensor([[1.0, 0.5]]))
    layer.bias.data.fill_(0.3)
    data = torch.tensor([[0.0, 255.0], [1.0, 0.0]])
    sim = eq.calibrate(eq.prepare(layer, data, qconfig_mapping=MINMAX), [data])  # a step of 1
    zero = torch.zeros(1, 2)  # on every grid: the output is the bias
    x, weight = "input:quantized", "weight"
    assert switchable(sim) == {x, weight}
    step = torch.tensor(1.0) / 127
    rounded = float(torch.round(torch.tensor(0.3) / step) * step)
    for names, wanted in (([x], 0.3), ([weight], 0.3), ([x, weight], rounded)):
        with quantizing(sim, names):
            assert float(sim(zero).detach()) == pytest.approx(wanted, abs=1e-6)


def test_a_module_called_twice_is_one_layer() -> None:
    sim = eq.calibrate(eq.prepare(Branches(), (IMAGES, IMAGES)), [(IMAGES, -IMAGES)])
    layers = {unit.module: unit.quantizers for unit in units_of(sim) if unit.part == "layer"}
    assert set(layers) == {"shared", "head"}
    assert layers["shared"].count("shared.weight") == 1
    assert len(layers["shared"]) == 3  # a weight, and the output of either call


def test_refusals() -> None:
    sim = eq.prepare(Scaled(), IMAGES)
    with pytest.raises(PhaseError, match="in phase float; call edgeqat.calibrate"), quantizing(sim, ()):
        pass
    eq.calibrate(sim, [IMAGES])
    with pytest.raises(InputError, match="found no quantizer of 'convv', wanted names such as 'conv'"):
        quantizing(sim, ["convv"]).__enter__()
