"""Cross-layer equalization: exact in float, against the formula of the paper, and what it leaves alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import BATCHES, IMAGES, Chain, Normed, calibrated, uneven
from torch import Tensor, nn

import edgeqat as eq
from edgeqat.errors import PhaseError, PlanError
from edgeqat.ptq.equalize import SETTLED
from edgeqat.zoo import mobilenetv2_cifar, resnet20
from models import Branches, SmallNet, shake

LARGE = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


class Transposed(nn.Module):
    """Transposed convs on both sides of a pair, and 1-d convs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3), nn.ConvTranspose2d(6, 5, 2, stride=2)
        self.c, self.d = nn.ConvTranspose2d(5, 4, 3), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.a(x)), 2)
        return self.d(torch.relu(self.c(torch.relu(self.b(x)))))


@pytest.mark.parametrize(
    ("model", "x", "pairs"),
    [
        (Chain, IMAGES, ["first", "depthwise", "grouped", "fc1"]),
        (Transposed, IMAGES, ["a", "b", "c"]),
        (SmallNet, IMAGES, []),
        (resnet20, LARGE, [f"layer{i}.{j}.conv1" for i in (1, 2, 3) for j in (0, 1, 2)]),
    ],
    ids=["chain", "transposed", "small", "resnet20"],
)
def test_the_float_network_computes_the_same_bits(model: type[nn.Module], x: Tensor, pairs: list[str]) -> None:
    sim = eq.prepare(uneven(model()), x)
    before, weights = sim(x), {name: p.detach().clone() for name, p in sim.named_parameters()}
    done = eq.equalize(sim)
    assert [pair.first for pair in done.pairs] == pairs
    moved = {name for name, p in sim.named_parameters() if not torch.equal(p, weights[name])}
    assert bool(moved) == bool(pairs)
    assert torch.equal(sim(x), before)


def ranges(weight: Tensor, axis: int) -> np.ndarray:
    other = tuple(d for d in range(weight.dim()) if d != axis)
    found: np.ndarray = np.abs(weight.detach().double().numpy()).max(axis=other)
    return found


def test_a_pair_is_scaled_by_the_formula_of_the_paper() -> None:
    model = uneven(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 5, 3)))
    sim = eq.prepare(model, IMAGES)
    w1, b1, w2 = (sim.get_parameter(name).detach().clone() for name in ("0.weight", "0.bias", "3.weight"))
    r1, r2 = ranges(w1, 0), ranges(w2, 1)
    factors = torch.tensor(2.0 ** np.round(np.log2(np.sqrt(r1 * r2) / r2)), dtype=torch.float32)
    assert len(set(factors.tolist())) > 2
    eq.equalize(sim)
    assert torch.equal(sim.get_parameter("0.weight"), w1 / factors.reshape(-1, 1, 1, 1))
    assert torch.equal(sim.get_parameter("0.bias"), b1 / factors)
    assert torch.equal(sim.get_parameter("3.weight"), w2 * factors.reshape(1, -1, 1, 1))


def test_along_a_chain_all_neighbours_become_alike_within_a_factor_of_two() -> None:
    """Three layers share ranges: scaling the second pair moves what the first had made equal."""
    model = uneven(Chain())
    sim = eq.prepare(model, IMAGES)
    eq.equalize(sim)
    names = ("first", "depthwise")
    r1, r2 = (ranges(sim.get_parameter(f"{name}.weight"), 0) for name in names)
    # Each factor is off by up to half an exponent, and the depthwise layer has those of both pairs.
    assert np.abs(np.log2(r1 / r2)).max() <= 1.5 + SETTLED
    fc1, fc2 = sim.get_parameter("fc1.weight"), sim.get_parameter("fc2.weight")
    assert np.abs(np.log2(ranges(fc1, 0) / ranges(fc2, 1))).max() <= 2.0 + SETTLED


def test_channels_without_weights_and_tiny_ones_stay_finite() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    with torch.no_grad():
        model[0].weight[0] = 0.0
        model[2].weight[:, 1] = 0.0
        model[0].weight[2] *= 1e-12
    sim = eq.prepare(model, IMAGES)
    before, bias = sim(IMAGES), model[0].bias
    eq.equalize(sim)
    assert torch.equal(sim(IMAGES), before)
    assert torch.equal(sim.get_parameter("0.bias")[:2], bias[:2])
    assert torch.equal(sim.get_parameter("0.bias")[2], bias[2] * 2**8)  # not 2**20


def test_weights_with_one_scale_lose_less_once_channels_are_alike() -> None:
    """Channels made uneven as training may: the second layer makes up for what the first has more of."""

    def noise(equalized: bool) -> float:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
        uneven_by = 10.0 ** torch.linspace(-1.5, 1.5, 8)
        with torch.no_grad():
            model[0].weight.mul_(uneven_by.reshape(-1, 1, 1, 1))
            model[0].bias.mul_(uneven_by)
            model[2].weight.div_(uneven_by.reshape(1, -1, 1, 1))
            weight = eq.WeightConfig(per_channel=False)
            sim = eq.prepare(model, IMAGES, qconfig_mapping=eq.QConfig(weight=weight))
            wanted = sim(IMAGES)
            if equalized:
                eq.equalize(sim)
            return float((eq.calibrate(sim, BATCHES)(IMAGES) - wanted).square().mean())

    assert noise(equalized=True) < 0.01 * noise(equalized=False)


def test_the_way_back_gives_the_users_class() -> None:
    model = uneven(Chain())
    sim = eq.prepare(model, IMAGES)
    eq.equalize(sim)
    back = sim.to_float()
    original = Chain().eval()
    original.load_state_dict(back.state_dict())
    with torch.no_grad():
        expected, found = model(IMAGES), original(IMAGES)
    # Folding and unfolding round each weight twice; see test_to_float.
    assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
    assert not torch.equal(back.first.weight, model.first.weight)


@pytest.mark.parametrize(
    ("model", "op", "reason"),
    [
        (mobilenetv2_cifar, "features.0", "a ReLU6 is behind it"),
        (SmallNet, "conv1", "2 ops read conv1"),
        (SmallNet, "fc", "its result"),
        (SmallNet, "conv2", "add (add) is behind it"),
    ],
)
def test_what_is_left_alone_is_said(model: type[nn.Module], op: str, reason: str) -> None:
    done = eq.equalize(eq.prepare(shake(model()).eval(), LARGE))
    assert reason in done.skipped[op]


def test_shared_weights_are_left_alone() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared, self.last = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.shared(torch.relu(self.shared(x))))

    done = eq.equalize(eq.prepare(Twice().eval(), IMAGES))
    assert not done.pairs and sum("2 layers have shared.weight" in r for r in done.skipped.values()) == 2
    assert not eq.equalize(eq.prepare(Branches().eval(), (IMAGES, IMAGES))).pairs


def test_a_first_convolution_that_normalises_pixels_is_scaled_too() -> None:
    images = torch.randint(256, (8, 3, 12, 12), dtype=torch.uint8)
    pixels = eq.Pixels((0.5, 0.4, 0.3), (0.2, 0.2, 0.3))
    sim = eq.prepare(uneven(Chain()), images, pixels=pixels)
    before = sim(images)
    assert eq.equalize(sim).pairs[0].first == "first" and torch.equal(sim(images), before)
    eq.calibrate(sim, [images])
    assert eq.adaround(sim, [images], eq.AdaRoundConfig(iterations=5)).layers[0].name == "first"


def test_refusals() -> None:
    with pytest.raises(PhaseError, match="prepare it again"):
        eq.equalize(calibrated(Normed().eval()))
    sim = calibrated(Normed().eval())
    sim.set_phase("float")
    with pytest.raises(PhaseError, match="was calibrated"):
        eq.equalize(sim)
    with pytest.raises(PlanError, match="norm is live; prepare with batch_norm='fold'"):
        eq.equalize(eq.prepare(Normed().eval(), IMAGES, batch_norm="live"))
