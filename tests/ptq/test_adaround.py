"""AdaRound: its integers are those of convert, the grid stays to the bit, and no layer gets worse."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from networks import BATCHES, IMAGES, Chain, Normed, calibrated, uneven
from torch import Generator, Tensor, nn

import edgeqat as eq
from edgeqat import affine
from edgeqat.errors import CalibrationWarning, DataError, PhaseError, PlanError
from edgeqat.op_attrs import ConvAttrs, LinearAttrs
from edgeqat.ptq.patches import as_matrix, draw
from edgeqat.ptq.snap import Neighbours, snap
from models import Branches, shake
from own_targets import write_target

QUICK = eq.AdaRoundConfig(iterations=150, positions=8, batch_size=64, learning_rate=0.05)
SETTINGS = {
    "minmax": {},
    "mse": {"observer": "mse"},
    "per tensor": {"per_channel": False},
    "learned": {"learned": True, "observer": "mse"},
    "8 bits": {"bits": 8},
    "2 bits": {"bits": 2},
}


def integers(sim: eq.SimulatedModel) -> dict[str, Tensor]:
    """The integers of every weight, as a program would have them; the simulation stays open."""
    program = eq.convert(copy.deepcopy(sim))
    return {name: const.data.float() for name, const in program.consts.items() if const.data is not None}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_integers_are_neighbours_scales_stay_and_no_layer_gets_worse(settings: dict[str, object]) -> None:
    sim = calibrated(uneven(Chain()), **settings)  # type: ignore[arg-type]
    before = {name: sim.get_parameter(name).detach().clone() for name in sim.weight_quantizers()}
    scales = {name: q.scale_of(before[name]).clone() for name, q in sim.weight_quantizers().items()}
    done = eq.adaround(sim, BATCHES, QUICK)
    assert [layer.weight for layer in done.layers] == list(before) and not done.skipped
    found, moved = integers(sim), 0
    for layer in done.layers:
        quantizer, weight = sim.weight_quantizers()[layer.weight], sim.get_parameter(layer.weight)
        assert torch.equal(quantizer.scale_of(weight), scales[layer.weight])
        scale = affine.broadcast(scales[layer.weight], quantizer.axis, weight.dim())
        steps = (before[layer.weight] / scale).clamp(-quantizer.qmax, quantizer.qmax)
        assert bool(((found[layer.weight] >= steps.floor()) & (found[layer.weight] <= steps.ceil())).all())
        share = float((found[layer.weight] != steps.round()).float().mean())
        assert share == pytest.approx(layer.moved)
        assert layer.error < layer.error_nearest if layer.moved else layer.error == layer.error_nearest
        moved += layer.moved > 0
    assert moved >= 2


def test_a_snapped_weight_is_rounded_to_what_was_chosen_on_the_scale_it_had() -> None:
    """Many channels of few weights, so that every way in which a quotient can be rounded occurs."""
    generator = Generator().manual_seed(0)
    for qmax, axis in itertools.product((1, 7, 63, 127), (0, 1, None)):
        weight = torch.randn(400, 500, generator=generator) * torch.rand(400, 500, generator=generator)
        scale = affine.symmetric_scale(weight, qmax, axis)
        neighbours = Neighbours(weight, scale, qmax, axis, follows=True)
        chosen = neighbours.rounded(torch.rand(weight.shape, generator=generator) < 0.5)
        snapped = snap(weight, chosen, scale, qmax, axis, follows=True)
        assert torch.equal(affine.symmetric_scale(snapped, qmax, axis), scale)
        zero = torch.zeros_like(scale, dtype=torch.int32)
        assert torch.equal(affine.quantize(snapped, scale, zero, -qmax, qmax, axis), chosen)
        assert bool((chosen != neighbours.nearest).any()) or qmax == 1
        again = Neighbours(snapped, scale, qmax, axis, follows=True)
        assert torch.equal(again.nearest, chosen)


def test_where_the_scale_is_a_floor_no_weight_is_so_large_that_it_would_raise_it() -> None:
    """A floor is any float32, and fl(fl(7 s) / 7) lies above s for one in twenty; never where s is a quotient by 7."""
    raised = 0
    mantissas = torch.arange(2000, dtype=torch.int32) * 4099 + 0x3F800000
    for floor in mantissas.view(torch.float32):
        weight = torch.tensor([6.8, 6.6]) * floor
        scale = affine.symmetric_scale(weight, 7, None, floor)
        raised += int(bool(7 * scale / 7 > scale))
        snapped = snap(weight, torch.tensor([7.0, 7.0]), scale, 7, None, follows=True)
        assert torch.equal(affine.symmetric_scale(snapped, 7, None, floor), scale)
        assert torch.equal(torch.round(snapped / scale), torch.tensor([7.0, 7.0]))
    assert raised > 0


def test_scales_that_are_powers_of_two_stay(tmp_path: Path) -> None:
    target = write_target(tmp_path, "weights: {power_of_two: true}\n")
    mapping = eq.QConfig(weight=eq.WeightConfig(bits=4))
    sim = eq.calibrate(eq.prepare(uneven(Chain()), IMAGES, target, mapping), BATCHES)
    before = {name: q.scale_of(sim.get_parameter(name)).clone() for name, q in sim.weight_quantizers().items()}
    done = eq.adaround(sim, BATCHES, QUICK)
    assert any(layer.moved for layer in done.layers)
    for name, quantizer in sim.weight_quantizers().items():
        assert torch.equal(quantizer.scale_of(sim.get_parameter(name)), before[name])


CONVS = {
    "1d": (nn.Conv1d(4, 6, 3, stride=2, padding=1), (4, 11)),
    "2d": (nn.Conv2d(3, 5, (3, 2), stride=(1, 2), padding=(0, 1), dilation=(2, 1)), (3, 9, 8)),
    "grouped": (nn.Conv2d(4, 8, 3, padding=1, groups=2), (4, 6, 5)),
    "depthwise": (nn.Conv2d(4, 4, 3, padding=2, groups=4), (4, 6, 5)),
    "3d": (nn.Conv3d(2, 3, (1, 2, 3), stride=(1, 1, 2), padding=(0, 1, 0)), (2, 3, 4, 7)),
}


@pytest.mark.parametrize("name", CONVS)
def test_the_product_over_all_windows_is_the_convolution(name: str) -> None:
    conv, shape = CONVS[name]
    conv = conv.double()
    x = torch.randn(3, *shape, dtype=torch.float64)
    padding = tuple((p, p) for p in conv.padding)
    attrs = ConvAttrs(conv.stride, padding, conv.dilation, conv.groups)
    y = conv(x).detach()
    for positions in (10**6, 7):
        found = draw(attrs, conv.weight.shape[2:], [x[:2], x[2:]], [y[:2], y[2:]], positions, Generator())
        product = torch.einsum("pgk,gok->pgo", found.inputs, as_matrix(conv.weight, attrs))
        product = product + conv.bias.reshape(conv.groups, -1)
        assert torch.allclose(product, found.targets, rtol=0, atol=1e-12)
        assert len(found.inputs) == 3 * min(positions, y[0, 0].numel())


def test_uneven_padding_and_rows_of_linear_layers() -> None:
    conv = nn.Conv1d(2, 3, 4).double()
    x = torch.randn(2, 2, 9, dtype=torch.float64)
    attrs, y = ConvAttrs((1,), ((1, 2),), (1,), 1), conv(F.pad(x, (1, 2))).detach()
    found = draw(attrs, (4,), [x], [y], 10**6, Generator())
    product = found.inputs[:, 0] @ conv.weight.flatten(1).T + conv.bias
    assert torch.allclose(product, found.targets[:, 0], rtol=0, atol=1e-12)
    x, y = torch.randn(2, 5, 4), torch.randn(2, 5, 3)
    rows = draw(LinearAttrs(), (), [x], [y], 5, Generator())
    assert torch.equal(rows.inputs, x.reshape(10, 1, 4)) and torch.equal(rows.targets, y.reshape(10, 1, 3))
    assert len(draw(LinearAttrs(), (), [x], [y], 3, Generator()).inputs) == 6


def rounded_bias(sim: eq.SimulatedModel, layer: str, source: str) -> Tensor:
    """A layer's bias as int32 steps would hold it."""
    weight = sim.get_parameter(f"{layer}.weight")
    scales = sim.quantizer_of(source).scale_now(), sim.weight_quantizers()[f"{layer}.weight"].scale_of(weight)
    steps = affine.quantize_bias(sim.get_parameter(f"{layer}.bias"), *scales)
    return (steps * scales[0].double() * scales[1].double()).float()


def test_the_errors_told_are_those_of_the_layers() -> None:
    """By hand: the second layer of two, behind its ReLU, reading what the rounded first gives."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU()).eval()
    sim = calibrated(model, bits=3)
    twin = copy.deepcopy(sim)
    twin.set_phase("float")
    everywhere = eq.AdaRoundConfig(iterations=100, positions=10**4, learning_rate=0.05)
    first, second = eq.adaround(sim, BATCHES, everywhere).layers
    quantizers = sim.activation_quantizers()
    with torch.no_grad():
        x = quantizers["input:quantized"](IMAGES)
        wanted = twin(IMAGES)
        inner = quantizers["0"](F.conv2d(x, sim.get_parameter("0.weight"), rounded_bias(sim, "0", "input:quantized")))
        bias = rounded_bias(sim, "2", "0")
        for weight, error in (
            (sim.get_parameter("2.weight"), second.error),
            (sim.weight_quantizers()["2.weight"](twin.get_parameter("2.weight"))[0], second.error_nearest),
        ):
            found = F.relu(F.conv2d(inner, weight, bias))
            assert float((found - wanted).square().sum() / wanted.square().sum()) == pytest.approx(error, rel=1e-5)
    assert first.moved > 0 and second.moved > 0


def test_it_comes_near_the_best_of_all_roundings() -> None:
    """One output of ten weights: every one of the 2^10 roundings can be tried."""
    torch.manual_seed(3)
    layer = nn.Linear(10, 1, bias=False).eval()
    x = torch.relu(torch.randn(200, 10) @ torch.randn(10, 10))
    sim = eq.calibrate(eq.prepare(layer, x, qconfig_mapping=eq.QConfig(weight=eq.WeightConfig(bits=4))), [x])
    weight, quantizer = layer.weight.detach(), sim.weight_quantizers()["weight"]
    scale = quantizer.scale_of(weight)
    neighbours = Neighbours(weight, scale, 7, quantizer.axis, follows=True)
    (value,) = sim.activation_quantizers().values()
    inputs, wanted = value(x).double(), x.double() @ weight.double().T
    ups = torch.tensor(list(itertools.product([False, True], repeat=10)))
    roundings = torch.stack([neighbours.rounded(up[None]) for up in ups]).squeeze(1).double()
    errors = (inputs @ (roundings * scale.double()).T - wanted).square().sum(0)
    nearest = float((inputs @ (neighbours.nearest.double() * scale.double()).T - wanted).square().sum())
    eq.adaround(sim, [x], eq.AdaRoundConfig(iterations=600, learning_rate=0.02))
    chosen = integers(sim)["weight"].double()
    found = float((inputs @ (chosen * scale.double()).T - wanted).square().sum())
    better = float((errors < found * (1 - 1e-9)).double().mean())
    assert found < 0.5 * nearest and better < 0.01


def test_a_layer_whose_relu_gives_zero_stays_as_it_was() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    model[0].bias.data.fill_(-100.0)
    with pytest.warns(CalibrationWarning):
        sim = calibrated(model)
    before = sim.get_parameter("0.weight").detach().clone()
    done = eq.adaround(sim, BATCHES, QUICK)
    assert done.layers[0].moved == 0.0 and torch.equal(sim.get_parameter("0.weight"), before)


def test_the_seed_decides_and_nothing_else() -> None:
    sims = [calibrated(uneven_chain()) for _ in range(3)]
    for sim, seed, noise in zip(sims, (0, 0, 1), (1, 2, 3), strict=True):
        torch.manual_seed(noise)
        eq.adaround(sim, BATCHES, eq.AdaRoundConfig(iterations=60, positions=4, learning_rate=0.05, seed=seed))
    first, again, other = ({name: p.detach() for name, p in sim.named_parameters()} for sim in sims)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def uneven_chain() -> nn.Module:
    torch.manual_seed(0)
    return uneven(Chain())


def test_it_leaves_modes_as_they_were_tells_of_each_layer_and_can_be_trained_on() -> None:
    sim = calibrated(uneven_chain()).train()
    told: list[str] = []
    done = eq.adaround(sim, BATCHES, QUICK, on_layer=lambda layer: told.append(layer.name))
    assert sim.training and sim.phase == "quantized" and told == [layer.name for layer in done.layers]
    start = integers(sim)
    eq.fit(sim, [(IMAGES, torch.arange(24) % 10)], epochs=1, lr=1e-6)
    assert all(torch.equal(value, start[name]) for name, value in integers(sim).items())  # it starts from them


def test_what_is_left_at_nearest_rounding_is_said() -> None:
    pair = (IMAGES, IMAGES.flip(0))
    sim = eq.calibrate(eq.prepare(Branches().eval(), pair), [pair])
    done = eq.adaround(sim, [pair], QUICK)
    assert [layer.weight for layer in done.layers] == ["head.weight"]
    assert list(done.skipped.values()) == ["2 layers have its weight"] * 2
    sim = calibrated(nn.Sequential(nn.ConvTranspose2d(3, 2, 2), nn.ReLU(), nn.Conv2d(2, 2, 1)).eval())
    done = eq.adaround(sim, BATCHES, QUICK)
    assert done.skipped == {"0": "it is a transposed convolution"} and len(done.layers) == 1


def test_refusals() -> None:
    sim = eq.prepare(Normed().eval(), IMAGES)
    with pytest.raises(PhaseError, match="call edgeqat.calibrate first"):
        eq.adaround(sim, BATCHES)
    sim = calibrated(shake(Normed()).eval())
    with pytest.raises(DataError, match="no calibration batches"):
        eq.adaround(sim, [])
    eq.convert(sim)
    with pytest.raises(PhaseError, match=r"reopen it with set_phase\('quantized'\)"):
        eq.adaround(sim, BATCHES)
    live = eq.calibrate(eq.prepare(Normed().eval(), IMAGES, batch_norm="live"), BATCHES)
    with pytest.raises(PlanError, match="adaround wants folded batch norms, and norm is live"):
        eq.adaround(live, BATCHES)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"iterations": 0}, "iterations is 0, wanted at least 1"),
        ({"positions": 0}, "positions is 0"),
        ({"batch_size": -1}, "batch_size is -1"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0, wanted a number above 0"),
        ({"strength": float("nan")}, "strength is nan"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_settings_out_of_range(settings: dict[str, float], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        eq.AdaRoundConfig(**settings)  # type: ignore[arg-type]
