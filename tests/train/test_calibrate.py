from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import edgeqat as eq
from edgeqat.errors import CalibrationWarning, DataError, InputError, PhaseError, PlanError
from models import SmallNet, shake

IMAGE = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_ranges_come_from_what_was_seen() -> None:
    mapping = eq.QConfig(activation=eq.ActivationConfig(observer="minmax"))
    sim = eq.prepare(nn.Conv2d(3, 3, 1).eval(), IMAGE, qconfig_mapping=mapping)
    eq.calibrate(sim, [IMAGE[:8], IMAGE[8:]])
    quantizer = sim.quantizer_of("input:quantized")
    low, high = float(IMAGE.min()), float(IMAGE.max())
    assert float(quantizer.scale) == pytest.approx((high - low) / 255, rel=1e-6)
    assert int(quantizer.zero_point) == round(-low / float(quantizer.scale))
    assert sim.phase == "quantized"


def test_behind_a_relu_the_zero_point_is_zero_and_relu6_ends_at_six() -> None:
    model = shake(SmallNet()).eval()
    sim = eq.calibrate(eq.prepare(model, 50 * IMAGE), [50 * IMAGE])
    assert int(sim.quantizer_of("conv1").zero_point) == 0
    capped = sim.quantizer_of("add_1")
    assert int(capped.zero_point) == 0 and float(capped.scale) * 255 <= 6.0 * (1 + 1e-6)


def test_it_restores_train_mode_and_can_be_repeated() -> None:
    sim = eq.prepare(shake(SmallNet()).train(), IMAGE)
    assert eq.calibrate(sim, [IMAGE]).training
    first = sim.quantizer_of("conv1").scale.clone()
    eq.calibrate(sim, [2 * IMAGE])
    assert float(sim.quantizer_of("conv1").scale) > float(first)
    eq.calibrate(sim, [IMAGE])
    assert torch.equal(sim.quantizer_of("conv1").scale, first)


@pytest.mark.parametrize("observer", ["minmax", "moving_average", "histogram", "percentile", "mse"])
def test_every_observer_gives_a_usable_network(observer: str) -> None:
    torch.manual_seed(0)
    model = shake(SmallNet()).eval()
    mapping = eq.QConfig(activation=eq.ActivationConfig(observer=observer))
    sim = eq.calibrate(eq.prepare(model, IMAGE, qconfig_mapping=mapping), [IMAGE])
    with torch.no_grad():
        error = (sim(IMAGE) - model(IMAGE)).abs().max() / model(IMAGE).abs().max()
    assert float(error) < 0.1


def check_grids(sim: eq.SimulatedModel, data: Tensor) -> None:
    program = eq.convert(sim)
    for value in program.values.values():
        if value.grid is not None:
            scale, zero_point = value.grid.per_tensor()
            assert scale > 0 and 0 <= zero_point <= 255
    assert bool(torch.isfinite(eq.reference(program, data)).all())


@pytest.mark.parametrize("observer", ["minmax", "moving_average", "histogram", "percentile", "mse"])
@pytest.mark.parametrize(
    ("value", "found"), [(0.0, "nothing but 0"), (0.7, "nothing but 0.7"), (1e30, "a magnitude of 1e+30")]
)
def test_degenerate_data_gives_legal_grids_and_a_warning(value: float, found: str, observer: str) -> None:
    data = torch.full_like(IMAGE, value)
    if value == 1e30:
        data = IMAGE.clone()
        data[0, 0, 0, 0] = value
    mapping = eq.QConfig(activation=eq.ActivationConfig(observer=observer))
    sim = eq.prepare(shake(SmallNet()).eval(), IMAGE, qconfig_mapping=mapping)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        eq.calibrate(sim, [data])
    assert {w.category for w in caught} == {CalibrationWarning}
    # An outlier of the input makes others behind it; the first line names the cause.
    assert str(caught[0].message).startswith(f"x:quantized: found {found} in calibration")
    check_grids(sim, data)


def test_an_observer_that_cannot_be_made_leaves_the_simulation_as_it_was() -> None:
    made: list[Any] = []

    def second_fails() -> Any:
        made.append(torch.ao.quantization.MinMaxObserver())
        return made[-1] if len(made) < 2 else None

    mapping = eq.QConfig(activation=eq.ActivationConfig(observer=second_fails))
    sim = eq.prepare(shake(SmallNet()).train(), IMAGE, qconfig_mapping=mapping)
    with pytest.raises(PlanError, match="^conv1: the observer NoneType has no call"):
        eq.calibrate(sim, [IMAGE])
    assert sim.phase == "float" and sim.training
    assert {q.mode for q in sim.activation_quantizers().values()} == {"float"}


def test_large_inputs_are_ordinary() -> None:
    check_grids(eq.calibrate(eq.prepare(shake(SmallNet()).eval(), IMAGE), [1e4 * IMAGE]), 1e4 * IMAGE)


def test_a_nan_of_the_model_s_own_is_refused_and_named() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()).eval()
    sim = eq.prepare(model, IMAGE)
    sim.get_parameter("0.weight").data[1] = torch.nan
    with pytest.raises(PhaseError, match=r"^0 held NaN in calibration, though all inputs were finite"):
        eq.calibrate(sim, [IMAGE])
    assert sim.phase == "float"


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        ([], DataError, "found no calibration batches"),
        ([IMAGE, IMAGE.clone().fill_(float("nan"))], DataError, "calibration batch 2 holds NaN or infinite inputs"),
        ([IMAGE, IMAGE / 0], DataError, "calibration batch 2 holds NaN or infinite"),
        ([(IMAGE, IMAGE)], InputError, "found inputs"),
    ],
    ids=["none", "nan", "inf", "two inputs"],
)
def test_bad_data_leaves_the_simulation_in_float(batches: list[object], error: type[Exception], message: str) -> None:
    sim = eq.prepare(shake(SmallNet()).eval(), IMAGE)
    with pytest.raises(error, match=message):
        eq.calibrate(sim, batches)  # type: ignore[arg-type]
    assert sim.phase == "float"
    eq.calibrate(sim, [IMAGE])  # and it can be calibrated after all
