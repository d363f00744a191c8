from __future__ import annotations

import functools
import logging
import pickle  # noqa: TID251  to weigh what an observer holds; nothing is read back
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import edgeqat as eq
from edgeqat import affine
from edgeqat.errors import CalibrationWarning, EdgeqatError, PhaseError, PlanError
from edgeqat.simulate.observers import Observer, make_observer, observed_range
from edgeqat.simulate.range_methods import METHODS, Percentile

NORMAL = torch.randn(50000, generator=torch.Generator().manual_seed(1))
BITS = st.sampled_from([2, 4, 8])


def observed(observer: Any, *batches: Tensor, qmax: int = 255) -> tuple[float, float]:
    """The range an observer finds."""
    looking = make_observer(observer, 0, qmax, "conv1")
    for batch in batches:
        assert looking(batch) is batch
    return observed_range(looking, 0, qmax, "conv1")


def grid(observer: Any, *batches: Tensor, qmax: int = 255) -> tuple[float, int]:
    """The grid that its range gives, checked to be legal."""
    scale, zero_point = affine.activation_qparams(*observed(observer, *batches, qmax=qmax), 0, qmax)
    assert bool(torch.isfinite(scale)) and float(scale) > 0.0 and 0 <= int(zero_point) <= qmax
    return float(scale), int(zero_point)


def torchao_observer(name: str) -> Any:
    """torchao's class."""
    logging.disable(logging.WARNING)
    try:
        from torchao.quantization.pt2e import observer
    finally:
        logging.disable(logging.NOTSET)
    return getattr(observer, name)


# What is seen


def test_minmax_spans_what_was_seen() -> None:
    assert observed("minmax", NORMAL[:100], NORMAL[100:]) == (float(NORMAL.min()), float(NORMAL.max()))


@pytest.mark.parametrize("qmax", [255, 15])
@pytest.mark.parametrize("make", [lambda x: x, torch.relu, lambda x: x**3, lambda x: 5 - x.abs(), lambda x: -1 - x**2])
def test_every_observer_keeps_zero_and_stays_within_a_step_of_the_extremes(make: Any, qmax: int) -> None:
    x = make(NORMAL)
    wide, _ = grid("minmax", x, qmax=qmax)
    for name in METHODS:
        scale, zero_point = grid(name, x, qmax=qmax)
        low, high = -zero_point * scale, (qmax - zero_point) * scale
        assert low <= 0.0 <= high
        # The zero point is rounded, which moves both ends by half a step.
        assert low >= min(float(x.min()), 0.0) - 0.51 * wide and high <= max(float(x.max()), 0.0) + 0.51 * wide


@pytest.mark.parametrize("name", ["moving_average", "histogram"])
@pytest.mark.parametrize("spread", [1e-6, 1.0, 1e6])
def test_torchao_s_observers_keep_their_results(name: str, spread: float) -> None:
    kind = {"moving_average": "MovingAverageMinMaxObserver", "histogram": "HistogramObserver"}[name]
    theirs = torchao_observer(kind)(quant_min=0, quant_max=255, eps=1e-10)
    generator = torch.Generator().manual_seed(2)
    batches = [torch.randn(4000, generator=generator) * spread * (1 + i) for i in range(4)]
    for batch in batches:
        theirs(batch)
    if name == "moving_average":
        assert observed(name, *batches) == (float(theirs.min_val), float(theirs.max_val))
    else:
        scale, zero_point = theirs.calculate_qparams()
        assert grid(name, *batches) == (float(scale), int(zero_point))


def test_more_values_than_float32_can_count_are_counted() -> None:
    """torch.histc stops at 2**24 values in a bin, so that half of 2**25 zeros were lost."""
    looking = make_observer("histogram", 0, 255)
    looking(torch.zeros(2**25 + 1))
    assert float(looking.method._observer.histogram.sum()) == 2**25  # the float32 next to it


def test_the_histogram_of_few_bits_is_searched_for_few_bits() -> None:
    def error(bound: tuple[float, float]) -> float:
        scale, zero_point = affine.activation_qparams(*bound, 0, 15)
        return float((affine.fake_quantize(NORMAL, scale, zero_point, 0, 15) - NORMAL).square().mean())

    theirs = torchao_observer("HistogramObserver")(quant_min=0, quant_max=15, eps=1e-10)
    theirs(NORMAL)
    scale, zero_point = (float(t) for t in theirs.calculate_qparams())
    assert error(observed("histogram", NORMAL, qmax=15)) < 0.9 * error(
        (-zero_point * scale, (15 - zero_point) * scale)
    )


def test_mse_is_the_better_histogram() -> None:
    def error(bound: tuple[float, float], qmax: int) -> float:
        scale, zero_point = affine.activation_qparams(*bound, 0, qmax)
        return float((affine.fake_quantize(NORMAL, scale, zero_point, 0, qmax) - NORMAL).square().mean())

    for qmax in (255, 15, 3):
        least = error(observed("mse", NORMAL, qmax=qmax), qmax)
        assert all(least <= error(observed(name, NORMAL, qmax=qmax), qmax) for name in METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_the_state_does_not_grow_with_the_number_of_batches(name: str) -> None:
    looking = make_observer(name, 0, 255)
    sizes = []
    for i in range(60):
        looking(NORMAL[:2000] * 1.3**i)  # every batch is out of the range of the last one
        sizes.append(len(pickle.dumps(looking)))
    # A Python integer that counts values grows by some bytes.
    assert sizes[-1] <= sizes[1] + 16
    assert sizes[-1] < 1_300_000


# Degenerate data


@settings(max_examples=30)  # the histogram's search takes longest where values are few
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=40), BITS)
def test_grids_are_legal_for_any_finite_data(values: list[float], bits: int) -> None:
    x = torch.tensor(values)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)
        for name in METHODS:
            grid(name, x[: len(values) // 2], x[len(values) // 2 :], qmax=2**bits - 1)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("magnitude", [1e-38, 1e-20, 1e20, 3e37])
def test_magnitudes_at_the_ends_of_float32_give_legal_grids(name: str, magnitude: float) -> None:
    scale, zero_point = grid(name, NORMAL * magnitude)
    assert scale == pytest.approx(max(magnitude * 8 / 255, affine.SCALE_FLOOR), rel=0.2)
    assert magnitude < 1.0 or 100 < zero_point < 155  # both signs keep their share


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(("value", "said"), [(0.0, "0"), (0.7, "0.7"), (-3.0, "-3")])
def test_a_constant_gives_a_legal_grid_and_a_warning(name: str, value: float, said: str) -> None:
    with pytest.warns(CalibrationWarning, match=rf"^conv1: found nothing but {said} in .* \(600 values\)") as caught:
        scale, zero_point = grid(name, *[torch.full((300,), value)] * 2)
    assert len(caught) == 1
    # The constant is represented to half a step, whichever end of the grid it is.
    assert value == 0.0 or abs((round(value / scale) * scale) - value) <= 0.5 * scale
    assert value != 0.0 or (scale, zero_point) == (1.0, 0)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("outlier", [1e4, -1e4, 1e30, -3e38])
def test_one_huge_outlier_gives_a_legal_grid_and_a_warning(name: str, outlier: float) -> None:
    x = torch.cat([NORMAL, torch.tensor([outlier])])
    message = r"^conv1: found a magnitude of .* times the 99.9 % quantile, 3\..*'percentile'"
    with pytest.warns(CalibrationWarning, match=message):
        scale, _ = grid(name, x[:300], x[300:])
    assert name != "percentile" or scale < 0.04  # nothing of the outlier is left


@pytest.mark.parametrize(
    "x",
    [
        NORMAL,
        NORMAL.relu(),
        (NORMAL - 3).relu(),  # nearly all is zero
        NORMAL**3,
        NORMAL.exp(),
        NORMAL * 1e-6,
        torch.sigmoid(100 * NORMAL),
        torch.rand(10),
        torch.tensor([1e-5, 1.0]),  # too few to tell
        torch.cat([torch.zeros(100_000), torch.ones(1)]),
    ],
)
def test_ordinary_data_give_no_warning(x: Tensor) -> None:
    for name in METHODS:
        grid(name, x)  # warnings are errors in these tests


@pytest.mark.parametrize("n", [10, 500, 999])
def test_of_few_values_the_largest_alone_may_be_an_outlier(n: int) -> None:
    x = torch.linspace(0.5, 1.0, n)
    x[n // 2] = 1e6
    with pytest.warns(CalibrationWarning, match="found a magnitude of 1e\\+06"):
        grid("minmax", x)


def test_a_thousand_times_the_quantile_is_where_an_outlier_begins() -> None:
    x = torch.linspace(0.9, 1.0, 5000)
    grid("minmax", torch.cat([x, torch.tensor([990.0])]))
    with pytest.warns(CalibrationWarning, match=r"1.2e\+03 in calibration, 1.2e\+03 times the 99.9 % quantile, 1;"):
        grid("minmax", torch.cat([x, torch.tensor([1200.0])]))


@pytest.mark.parametrize("name", METHODS)
def test_infinite_values_are_left_out_with_a_warning(name: str) -> None:
    with pytest.warns(CalibrationWarning, match="^conv1: found infinite values in calibration"):
        found = observed(name, torch.cat([NORMAL, torch.tensor([torch.inf, -torch.inf])]), torch.tensor([torch.inf]))
    assert found == observed(name, NORMAL)


def test_the_sample_behind_the_outlier_test_keeps_no_rhythm() -> None:
    """Every 8th column holds what is typical; a step of a multiple of 8 would see only that."""
    x = torch.ones(2**18, 8)
    x[:, 0] = 1e-4
    looking = make_observer("minmax", 0, 255)
    looking(x)
    assert looking.seen.outlier() is None
    x[:, 1:], x[:, 0] = 1e-4, 1.0
    looking = make_observer("minmax", 0, 255)
    looking(x)
    assert looking.seen.outlier() is None


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "^conv1 saw no finite data"),
        ([torch.empty(0, 3)], "^conv1 saw no finite data"),
        ([torch.full((3,), torch.inf)], "^conv1 saw no finite data"),
        ([NORMAL, torch.tensor([1.0, torch.nan])], "^conv1 held NaN in calibration"),
    ],
)
def test_no_data_and_nan_are_refused(batches: list[Tensor], message: str) -> None:
    for name in METHODS:
        with pytest.raises(PhaseError, match=message):
            observed(name, *batches)


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(EdgeqatError, match="found the observer 'guess', wanted one of minmax, moving_average"):
        make_observer("guess", 0, 255)


# Observers of the user's own


class Halves:
    """Half of the largest magnitude on either side, in signed integers."""

    quant_min, quant_max = -128, 127

    def __init__(self) -> None:
        self.largest = 0.0

    def __call__(self, x: Tensor) -> Tensor:
        self.largest = max(self.largest, float(x.abs().max()))
        return x

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        return torch.tensor([self.largest / 2 / 127.5]), torch.tensor([0])


def test_the_range_is_what_scale_zero_point_and_integers_imply() -> None:
    low, high = observed(Halves, torch.tensor([-51.0, 3.0]))
    assert (low, high) == (pytest.approx(-128 * 0.2), pytest.approx(127 * 0.2))


def test_an_observer_without_integers_of_its_own_has_those_of_the_grid() -> None:
    class Bare(Halves):
        quant_min = quant_max = None  # type: ignore[assignment]

    assert observed(Bare, torch.tensor([1.0, 51.0]), qmax=15) == (0.0, pytest.approx(15 * 0.2))


@pytest.mark.parametrize("source", ["torch.ao", "torchao"])
def test_the_libraries_own_observers_work_as_factories(source: str) -> None:
    kind = torch.ao.quantization.MinMaxObserver if source == "torch.ao" else torchao_observer("MinMaxObserver")
    factory = kind.with_args(dtype=torch.qint8, quant_min=-128, quant_max=127)
    assert grid(factory, NORMAL) == pytest.approx(grid("minmax", NORMAL), rel=1e-6)


def test_of_a_fake_quantize_module_the_observer_is_taken() -> None:
    factory = torch.ao.quantization.FakeQuantize.with_args(
        observer=torch.ao.quantization.HistogramObserver, quant_min=0, quant_max=255
    )
    looking = make_observer(factory, 0, 255)
    assert isinstance(looking.method._observer, torch.ao.quantization.HistogramObserver)
    looking(NORMAL)
    assert observed_range(looking, 0, 255, "x") == pytest.approx(observed("histogram", NORMAL), rel=1e-5)


def test_a_percentile_of_one_s_own() -> None:
    low, high = observed(functools.partial(Percentile, 90.0), NORMAL)
    assert low == pytest.approx(-1.28, abs=0.05) and high == pytest.approx(1.28, abs=0.05)
    with pytest.raises(PlanError, match="found the percentile 0.9, wanted one above 50"):
        Percentile(0.9)


class Broken(Halves):
    """Gives what it is told to give."""

    found: Any = None

    def calculate_qparams(self) -> Any:
        if isinstance(self.found, Exception):
            raise self.found
        return self.found


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (ValueError("not\nyet"), "gave no scale and zero_point: ValueError: not yet"),
        (None, "gave no scale and zero_point: TypeError"),
        ((torch.ones(3), torch.zeros(3)), "found 3 scales, wanted one"),
        ((0.0, 0), "gave scale 0 and zero_point 0 for the integers -128 .. 127"),
        ((-1.0, 0), "gave scale -1"),
        ((float("nan"), 0), "gave scale nan"),
        ((float("inf"), 0), "gave scale inf"),
        ((1.0, float("nan")), "zero_point nan"),
        (("a", 0), "gave no scale and zero_point"),
    ],
)
def test_broken_results_are_refused_in_one_line(found: Any, message: str) -> None:
    factory = type("Broken", (Broken,), {"found": found})
    with pytest.raises(PlanError, match=rf"^conv1: the observer Broken .*{message}") as caught:
        observed(factory, NORMAL)
    assert "\n" not in str(caught.value)


def fails() -> Observer:
    raise OSError("no\nfile")


class Blind(Halves):
    def __call__(self, x: Tensor) -> Tensor:
        raise RuntimeError("cannot look")


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (fails, "^conv1: the factory of its observer failed: OSError: no file$"),
        (dict, "^conv1: the observer dict has no call or no calculate_qparams"),
        (nn.ReLU, "^conv1: the observer ReLU has no call or no calculate_qparams"),
        (Blind, "^conv1: the observer Blind failed on a batch: RuntimeError: cannot look$"),
    ],
)
def test_what_is_no_observer_is_refused_in_one_line(factory: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        observed(factory, NORMAL)


def test_an_observer_of_one_s_own_calibrates_a_network_and_is_printed() -> None:
    x = torch.randn(4, 3, 8, 8)
    mapping = eq.QConfig(activation=eq.ActivationConfig(observer=Halves))
    sim = eq.prepare(nn.Conv2d(3, 3, 1).eval(), x, qconfig_mapping=mapping)
    assert "Halves range" in str(sim.plan)
    assert "observer=Halves" in repr(eq.calibrate(sim, [x]))
    quantizer = sim.quantizer_of("input:quantized")
    assert float(quantizer.scale) == pytest.approx(float(x.abs().max()) / 255, rel=1e-6)
    assert eq.convert(sim).plan_hash == sim.plan.program.plan_hash
