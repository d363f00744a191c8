"""sim.to_float(): the user's own class, loadable by the original code, computing what the simulation does in float."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import edgeqat as eq
from edgeqat.errors import PlanError
from edgeqat.zoo import edge_model, edge_model_with_stubs, mobilenetv2_cifar, resnet20
from models import SmallNet, shake

IMAGE = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
LARGE = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))

ROUNDING = 1e-5
"""Folding and unfolding round each weight twice; through some 20 layers that is below 1e-5 of the largest output."""

MODELS = {
    "small": (SmallNet, IMAGE),
    "edge": (edge_model, LARGE),
    "edge with stubs": (edge_model_with_stubs, LARGE),
    "resnet20": (resnet20, LARGE),
    "mobilenetv2": (lambda: mobilenetv2_cifar(width=0.5), LARGE),
}


def trained(model: nn.Module, x: Tensor, batch_norm: str) -> eq.SimulatedModel:
    sim = eq.calibrate(eq.prepare(model.eval(), x, batch_norm=batch_norm), [x])
    eq.fit(sim, [(x, torch.arange(len(x)) % 10)], epochs=2, lr=0.02, max_grad_norm=1.0)
    return sim


def close(found: Tensor, expected: Tensor) -> bool:
    return float((found - expected).abs().max()) <= ROUNDING * float(expected.abs().max())


@pytest.mark.parametrize("batch_norm", ["fold", "live"])
@pytest.mark.parametrize("name", MODELS)
def test_the_original_code_loads_it_and_computes_the_same(name: str, batch_norm: str) -> None:
    factory, x = MODELS[name]
    torch.manual_seed(0)
    model = shake(factory())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    sim = trained(model, x, batch_norm)
    back = sim.to_float()
    assert type(back) is type(model) and back is not model
    original = factory()
    original.load_state_dict(back.state_dict())
    sim.set_phase("quantized")
    sim.set_phase("float")
    with torch.no_grad():
        expected = sim.eval()(x)
        assert close(original.eval()(x), expected)
        if batch_norm == "live":
            assert torch.equal(original(x), expected)
        assert not close(model.eval()(x), expected)  # training did something
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_model_that_was_not_trained_comes_back_as_it_was() -> None:
    model = shake(SmallNet())
    back = eq.prepare(model, IMAGE).to_float()
    assert back.training == model.training
    for name, tensor in model.state_dict().items():
        found = back.state_dict()[name].double()
        # Two roundings to float32 of each weight; a bias is a difference of terms as large as 4.
        assert float((found - tensor).abs().max()) <= 4 * 2**-22, name


class Normed(nn.Module):
    def __init__(self, bias: bool, affine: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1, bias=bias), nn.Conv2d(4, 4, 3, bias=bias)
        self.norm, self.norm2 = nn.BatchNorm2d(4, affine=affine), nn.BatchNorm2d(4, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm2(self.b(torch.relu(self.norm(self.a(x)))))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "not affine"])
def test_with_and_without_biases_and_affine(bias: bool, affine: bool) -> None:
    torch.manual_seed(0)
    model = shake(Normed(bias, affine)).eval()
    sim = eq.prepare(model, IMAGE)
    with torch.no_grad():
        for parameter in sim.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        assert close(sim.to_float().eval()(IMAGE), sim(IMAGE))


def test_channels_without_gain_and_negative_ones() -> None:
    torch.manual_seed(0)
    model = shake(Normed(False, True)).eval()
    model.norm.weight.data[:3] = torch.tensor([0.0, -0.7, 1e-20])
    sim = eq.prepare(model, IMAGE)
    with torch.no_grad():
        sim.get_parameter("a.weight").add_(0.1)  # training may revive a dead channel
        back = sim.to_float().eval()
        assert close(back(IMAGE), sim(IMAGE))
    assert all(bool(torch.isfinite(t).all()) for t in back.state_dict().values())


class OneNormForTwo(nn.Module):
    def __init__(self, biases: tuple[bool, bool]) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1, bias=biases[0]), nn.Conv2d(4, 4, 1, bias=biases[1])
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.b(self.norm(self.a(x))))


@pytest.mark.parametrize("biases", [(True, True), (True, False), (False, True)], ids=str)
def test_one_norm_behind_two_convs(biases: tuple[bool, bool]) -> None:
    torch.manual_seed(0)
    sim = eq.prepare(shake(OneNormForTwo(biases)).eval(), IMAGE)
    with torch.no_grad():
        for parameter in sim.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        assert close(sim.to_float().eval()(IMAGE), sim(IMAGE))


def test_one_norm_with_two_shifts_is_refused() -> None:
    sim = eq.prepare(shake(OneNormForTwo((False, False))).eval(), IMAGE)
    with pytest.raises(PlanError, match=r"norm was folded into a and b, which have no biases of their own.*'live'"):
        sim.to_float()


def test_frozen_parameters_stay_frozen() -> None:
    model = SmallNet()
    model.conv3.weight.requires_grad_(False)
    back = eq.prepare(model, IMAGE).to_float()
    assert [name for name, p in back.named_parameters() if not p.requires_grad] == ["conv3.weight"]
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["conv3.weight"]
