from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import nn

import edgeqat as eq
from edgeqat.diagnose.distributions import BINS, Distribution, distributions, samples_within
from edgeqat.errors import CalibrationWarning, PhaseError
from models import SmallNet, shake

X = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def simulated(model: nn.Module, **activation: object) -> eq.SimulatedModel:
    config = eq.QConfig(eq.ActivationConfig(**activation))  # type: ignore[arg-type]
    return eq.calibrate(eq.prepare(model.eval(), X, qconfig_mapping=config), [X])


def found(sim: eq.SimulatedModel) -> dict[str, Distribution]:
    return {one.name: one for one in distributions(sim, X)}


def test_every_element_is_counted_in_its_bin() -> None:
    sim = simulated(nn.Conv2d(3, 4, 1))
    x, weight = found(sim)["input:quantized"], found(sim)["weight"]
    assert (x.part, weight.part) == ("activation", "weight")
    assert x.counts == tuple(torch.histc(X.double(), BINS, float(X.min()), float(X.max())).int().tolist())
    assert sum(x.counts) == X.numel() and sum(weight.counts) == 12
    assert (x.ranges.low, x.ranges.high) == (float(X.min()), float(X.max()))


def test_the_error_of_a_value_is_that_of_the_quantized_network() -> None:
    """Of the input its own; of the layer behind it what it inherits too."""
    sim = simulated(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1)))
    values = found(sim)
    layer = values["0"]
    assert layer.sqnr_db is not None and layer.ranges.sqnr > layer.sqnr_db
    seen: list[torch.Tensor] = []
    handle = sim.activation_quantizers()["0"].register_forward_hook(lambda _, __, y: seen.append(y))
    with torch.no_grad():
        wanted = torch.relu(nn.functional.conv2d(X, sim.get_parameter("0.weight"), sim.get_parameter("0.bias")))
        sim(X)
    handle.remove()
    error = (seen[0] - wanted).double().square().sum() / wanted.double().square().sum()
    assert layer.sqnr_db == pytest.approx(-10 * math.log10(float(error)), abs=1e-3)


def test_clipping_is_that_of_the_float_values() -> None:
    sim = simulated(nn.Conv2d(3, 4, 1), observer="percentile", observer_args={"percentile": 99.0})
    x = found(sim)["input:quantized"]
    assert 0.0 < x.ranges.clipped < 0.05 and x.ranges.high > x.ranges.grid_high


def test_a_constant_value_has_no_histogram() -> None:
    conv = nn.Conv2d(3, 1, 1)
    nn.init.zeros_(conv.weight)
    nn.init.constant_(conv.bias, 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)
        sim = simulated(nn.Sequential(conv, nn.ReLU(), nn.Conv2d(1, 1, 1)))
    assert found(sim)["0"].counts == ()


@pytest.mark.parametrize("batch_norm", ["fold", "live"])
def test_a_simulation_is_left_as_it_was(batch_norm: str) -> None:
    sim = eq.calibrate(eq.prepare(shake(SmallNet()).eval(), X, batch_norm=batch_norm), [X]).train()
    before = {name: tensor.clone() for name, tensor in sim.state_dict().items()}
    names = [one.name for one in distributions(sim, X)]
    assert len(names) == len(set(names)) and sim.training and sim.phase == "quantized"
    assert all(torch.equal(before[name], tensor) for name, tensor in sim.state_dict().items())


def test_a_simulation_without_grids_is_refused() -> None:
    with pytest.raises(PhaseError, match="calibrate"):
        distributions(eq.prepare(nn.Conv2d(3, 4, 1).eval(), X), X)


def test_samples_fit_into_memory() -> None:
    program = simulated(nn.Conv2d(3, 4, 1)).plan.program
    sizes = sum(math.prod(v.shape[1:]) for v in program.values.values() if v.grid is not None)  # type: ignore[arg-type]
    assert samples_within(program, largest=5 * sizes) == 5
    assert samples_within(program, largest=1) == 1
    assert samples_within(program) == 64
