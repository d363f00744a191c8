"""Batch norms in training: live, frozen after an epoch, estimated afresh; eps and momentum survive it all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import edgeqat as eq
from edgeqat.errors import DataError, InputError
from helpers import EXACT_ARITHMETIC
from models import SmallNet, shake

IMAGES = torch.randn(24, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 + 1
BATCHES = [(IMAGES[i : i + 8], torch.arange(8) % 10) for i in (0, 8, 16)]


def make(batch_norm: str = "live") -> eq.SimulatedModel:
    torch.manual_seed(0)
    sim = eq.prepare(shake(SmallNet()).eval(), IMAGES[:2], batch_norm=batch_norm)
    return eq.calibrate(sim, [IMAGES])


def statistics(sim: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in sim.named_buffers() if "running" in name}


def test_live_statistics_follow_the_data_with_the_user_s_momentum() -> None:
    sim = make().train()
    seen: list[Tensor] = []
    norm = sim.get_submodule("bn1")
    assert isinstance(norm, nn.BatchNorm2d) and (norm.eps, norm.momentum) == (1e-3, 0.03)
    norm.register_forward_hook(lambda m, args, out: seen.append(args[0].detach()))
    before = norm.running_mean.clone()
    sim(IMAGES[:8])
    expected = 0.97 * before.double() + 0.03 * seen[0].double().mean((0, 2, 3))
    assert torch.allclose(norm.running_mean.double(), expected, atol=1e-6)  # float32 against float64


@pytest.mark.parametrize("freeze_after", [0, 1])
def test_frozen_statistics_stay_and_the_rest_is_trained(freeze_after: int) -> None:
    sim = make()
    states: list[dict[str, Tensor]] = [statistics(sim)]
    gamma = sim.get_parameter("bn1.weight").detach().clone()
    schedule = eq.BatchNormSchedule(freeze_after=freeze_after)
    keep = lambda _: states.append(statistics(sim))  # noqa: E731
    eq.fit(sim, BATCHES, epochs=3, lr=0.01, batch_norm=schedule, on_epoch=keep)
    for epoch in range(3):
        same = all(torch.equal(states[epoch][n], states[epoch + 1][n]) for n in states[0])
        assert same == (epoch >= freeze_after)
    assert not torch.equal(sim.get_parameter("bn1.weight"), gamma)


def test_frozen_norms_of_a_simulation_survive_train() -> None:
    sim = make()
    sim.freeze_batch_norm()
    before = statistics(sim)
    sim.train()
    sim(IMAGES[:8])
    assert all(torch.equal(t, before[n]) for n, t in statistics(sim).items())
    sim.freeze_batch_norm(False)
    sim(IMAGES[:8])
    assert not all(torch.equal(t, before[n]) for n, t in statistics(sim).items())


@pytest.mark.parametrize("kind", ["float", "live"])
def test_reestimation_is_the_mean_over_the_batches_under_present_weights(kind: str) -> None:
    torch.manual_seed(0)
    model: nn.Module = make() if kind == "live" else shake(SmallNet()).eval()
    norm = model.get_submodule("bn1")
    assert isinstance(norm, nn.BatchNorm2d)
    seen: list[Tensor] = []
    handle = norm.register_forward_hook(lambda m, args, out: seen.append(args[0].detach().double()))
    model.train()
    modes = [m.training for m in model.modules()]
    assert eq.reestimate_batch_norm(model, [inputs for inputs, _ in BATCHES]) == 3
    handle.remove()
    assert norm.momentum == 0.03 and [m.training for m in model.modules()] == modes
    mean = torch.stack([x.mean((0, 2, 3)) for x in seen]).mean(0)
    var = torch.stack([x.var((0, 2, 3)) for x in seen]).mean(0)
    assert torch.allclose(norm.running_mean.double(), mean, atol=1e-5)
    assert torch.allclose(norm.running_var.double(), var, rtol=1e-5)


def test_fit_reestimates_before_it_validates() -> None:
    sim, twin = make(), make()
    schedule = eq.BatchNormSchedule(reestimate_batches=2)
    eq.fit(sim, BATCHES, epochs=1, lr=0.01, batch_norm=schedule)
    eq.fit(twin, BATCHES, epochs=1, lr=0.01)
    eq.reestimate_batch_norm(twin, [inputs for inputs, _ in BATCHES[:2]])
    assert all(torch.equal(t, statistics(twin)[n]) for n, t in statistics(sim).items())


def test_without_batches_or_batch_norms() -> None:
    with pytest.raises(DataError, match="found no batches"):
        eq.reestimate_batch_norm(make(), [])
    assert eq.reestimate_batch_norm(nn.Linear(2, 2), []) == 0
    assert eq.reestimate_batch_norm(make("fold"), []) == 0
    with pytest.raises(InputError, match="found freeze_after -1, wanted 0 or more"):
        eq.BatchNormSchedule(freeze_after=-1)


@EXACT_ARITHMETIC
@pytest.mark.parametrize("batch_norm", ["fold", "live", "frozen"])
def test_eps_and_momentum_survive_to_the_runtime(tmp_path: Path, batch_norm: str) -> None:
    """The oracle is float64, with the user's eps of 1e-3. Variances are near it, so that 1e-5 in its place is far."""
    torch.manual_seed(0)
    images = 0.01 * IMAGES
    model = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4, eps=1e-3, momentum=0.03)).eval()
    model[1].running_var.fill_(3e-4)
    model[1].weight.data.uniform_(0.5, 1.0)
    sim = eq.prepare(model, images, batch_norm="fold" if batch_norm == "fold" else "live")
    eq.calibrate(sim, [images])
    if batch_norm != "fold":
        schedule = eq.BatchNormSchedule(freeze_after=0 if batch_norm == "frozen" else None)
        batches = [(images, torch.zeros(24, 4, 16, 16))]
        eq.fit(sim, batches, epochs=1, lr=0.0, loss="mse", metric="mae", batch_norm=schedule)
    back = sim.to_float()
    assert isinstance(back, nn.Sequential)
    norm, weight = back[1].requires_grad_(False), back[0].weight.detach().double()
    assert (norm.eps, norm.momentum) == (1e-3, 0.03)
    program = eq.convert(sim)
    artifact = eq.lower(program, "onnxruntime", tmp_path / "a")
    assert eq.verify(artifact, program, [images]).bit_identical == 1.0
    found = torch.as_tensor(artifact.run(images)).double()

    def error(eps: float) -> float:
        y = torch.einsum("oi,nihw->nohw", weight[:, :, 0, 0], images.double()) - norm.running_mean.view(1, 4, 1, 1)
        y = y * (norm.weight / (norm.running_var.double() + eps).sqrt()).view(1, 4, 1, 1)
        return float((found - y - norm.bias.view(1, 4, 1, 1)).abs().quantile(0.99))

    step = float(program.grid_of(program.ops[-1].inputs[0]).filled()[0])
    # The 99th percentile, since a histogram's range clips a few: half a step of the output, half a step of each of
    # three inputs and weights of which the output's range is made.
    assert error(1e-3) < 2 * step < 8 * step < error(1e-5)
