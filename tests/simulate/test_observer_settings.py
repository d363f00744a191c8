"""Symmetric grids, output settings and observer arguments, from the QConfig to what runs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.ao.quantization import HistogramObserver, MinMaxObserver, MovingAverageMinMaxObserver

import edgeqat as eq
from edgeqat import affine
from edgeqat.errors import PlanError
from edgeqat.simulate.fake_quant import ActivationQuantizer
from helpers import EXACT_ARITHMETIC
from models import SmallNet, shake

IMAGE = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
TARGETS = torch.arange(8) % 10
SKEWED = torch.randn(4000, generator=torch.Generator().manual_seed(1)) + 1.0
SYMMETRIC = eq.ActivationConfig(symmetric=True)


def settled(config: eq.ActivationConfig, *batches: Tensor, activation: str | None = None) -> ActivationQuantizer:
    """A quantizer that has seen the batches."""
    quantizer = ActivationQuantizer("conv1", config, activation)
    quantizer.start_observing()
    for batch in batches:
        quantizer(batch)
    quantizer.settle()
    quantizer.mode = "quantize"
    return quantizer


# Symmetric


@given(st.floats(-1e4, 1e4, width=32), st.floats(-1e4, 1e4, width=32))
def test_a_symmetric_grid_is_torch_s(one: float, other: float) -> None:
    low, high = min(one, other), max(one, other)
    if max(-low, high) < 1e-3:  # where torch.ao's smallest scale, 1.2e-7, begins
        low = -1.0
    observer = MinMaxObserver(dtype=torch.qint8, qscheme=torch.per_tensor_symmetric)
    observer(torch.tensor([low, high]))
    scale, zero_point = observer.calculate_qparams()
    found = affine.activation_qparams(low, high, 0, 255, symmetric=True)
    assert torch.equal(found[0], scale[0]) and int(found[1]) == int(zero_point) + 128


TORCH_OBSERVERS: dict[str, Any] = {
    "minmax": MinMaxObserver,
    "moving_average": MovingAverageMinMaxObserver,
    "histogram": HistogramObserver,
}


@pytest.mark.parametrize("as_factory", [False, True], ids=["name", "factory"])
@pytest.mark.parametrize("name", TORCH_OBSERVERS)
def test_every_observer_finds_torch_s_symmetric_scale(name: str, as_factory: bool) -> None:
    factory = TORCH_OBSERVERS[name].with_args(dtype=torch.qint8, qscheme=torch.per_tensor_symmetric)
    observer = factory()
    batches = SKEWED.chunk(2)
    for batch in batches:
        observer(batch)
    quantizer = settled(eq.ActivationConfig(observer=factory if as_factory else name, symmetric=True), *batches)
    scale, zero_point = quantizer.grid()
    # Averages and histograms are kept in float32, ours of values times a power of two: a last digit.
    assert float(scale) == pytest.approx(float(observer.calculate_qparams()[0]), rel=1e-6)
    assert int(zero_point) == 128


def test_the_symmetric_search_finds_no_worse_grid_than_the_extremes() -> None:
    heavy = SKEWED**3

    def error(quantizer: ActivationQuantizer) -> float:
        return float((quantizer(heavy) - heavy).square().mean())

    errors = {name: error(settled(eq.ActivationConfig(4, name, symmetric=True), heavy)) for name in ("mse", "minmax")}
    assert errors["mse"] < 0.7 * errors["minmax"]
    # The search ends in steps of 1 %; 10 % to either side it is worse.
    best = settled(eq.ActivationConfig(4, "mse", symmetric=True), heavy)
    scale, zero_point = (t.clone() for t in best.grid())
    for factor in (0.9, 1.1):
        best.set_grid(scale * factor, zero_point)
        assert error(best) > errors["mse"]


@pytest.mark.parametrize("learned", [False, True], ids=["frozen", "learned"])
def test_behind_a_relu_the_zero_point_is_zero(learned: bool) -> None:
    one, other = (
        settled(
            eq.ActivationConfig(observer="minmax", learned=learned, symmetric=symmetric), SKEWED, activation="relu"
        )
        for symmetric in (True, False)
    )
    assert int(one.grid()[1]) == 0 and torch.equal(one.grid()[0], other.grid()[0])


def test_a_learned_symmetric_range_has_no_offset_and_its_zero_point_stays() -> None:
    quantizer = settled(eq.ActivationConfig(observer="minmax", learned=True, symmetric=True), SKEWED)
    assert [name for name, _ in quantizer.named_parameters()] == ["scale"]
    for scale in (quantizer.grid()[0], quantizer.grid()[0] * 1.7):
        with torch.no_grad():
            quantizer.scale.copy_(scale)
        expected = affine.fake_quantize(SKEWED, scale, torch.tensor(128), 0, 255)
        assert torch.equal(quantizer(SKEWED[None])[0], expected) and int(quantizer.grid()[1]) == 128
    quantizer(SKEWED[None]).square().sum().backward()
    assert quantizer.scale.grad is not None and float(quantizer.scale.grad) != 0.0


def test_signed_changes_how_a_grid_is_described_and_nothing_computed() -> None:
    plain, signed = (settled(eq.ActivationConfig(observer="minmax", signed=s), SKEWED) for s in (False, True))
    assert torch.equal(plain(SKEWED), signed(SKEWED))
    zero_point = int(plain.grid()[1])
    assert f"0..255, scale={float(plain.scale):.4g}, zero_point={zero_point}, observer=minmax" == plain.extra_repr()
    assert signed.extra_repr().startswith("-128..127, ")
    assert f"zero_point={zero_point - 128}, observer=signed minmax" in signed.extra_repr()


@EXACT_ARITHMETIC
@pytest.mark.parametrize("target", ["onnxruntime", "torchscript"])
@pytest.mark.parametrize("learned", [False, True], ids=["frozen", "learned"])
def test_symmetric_grids_are_what_runs(tmp_path: Path, target: str, learned: bool) -> None:
    torch.manual_seed(0)
    qconfig = eq.QConfig(eq.ActivationConfig(symmetric=True, signed=True, learned=learned))
    sim = eq.calibrate(eq.prepare(shake(SmallNet()).eval(), IMAGE, target, qconfig), [IMAGE])
    eq.fit(sim, [(IMAGE, TARGETS)] * 2, epochs=1, lr=0.002)
    program = eq.convert(sim)
    for name, quantizer in sim.activation_quantizers().items():
        assert program.grid_of(name).per_tensor()[1] == (0 if quantizer.activation else 128), name
    assert eq.verify(eq.lower(program, target, tmp_path / "a"), program, [IMAGE]).bit_identical == 1.0


# Output


class TwoConvs(nn.Module):
    """What the first makes the second reads."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


MINMAX, MSE = eq.ActivationConfig(observer="minmax"), eq.ActivationConfig(observer="mse")


def test_activation_is_what_brings_the_input_in_and_output_is_the_result() -> None:
    planned = eq.plan(TwoConvs(), IMAGE, qconfig_mapping=eq.QConfig(activation=MINMAX, output=MSE))
    assert planned.activations == {"x:quantized": MINMAX, "a": MSE, "b": MSE}
    assert "(integer kernel, mse range)" in str(planned) and "(enters the integers, minmax range)" in str(planned)


def test_without_output_it_is_the_activation() -> None:
    planned = eq.plan(TwoConvs(), IMAGE, qconfig_mapping=eq.QConfig(activation=MINMAX))
    assert set(planned.activations.values()) == {MINMAX}


@pytest.mark.parametrize(
    ("qconfig", "message"),
    [
        (
            eq.QConfig(output=eq.ActivationConfig(bits=4)),
            "a: found 4-bit activations, but torchscript takes 8 bits",
        ),
        (
            eq.QConfig(output=eq.ActivationConfig(observer="reuse_input")),
            "a: found the observer 'reuse_input', which is for ops that only move integers; give it one that finds a "
            "range",
        ),
    ],
    ids=["bits", "reuse_input"],
)
def test_an_output_that_no_target_can_make_is_refused(qconfig: eq.QConfig, message: str) -> None:
    with pytest.raises(PlanError) as caught:
        eq.plan(TwoConvs(), IMAGE, "torchscript", qconfig)
    assert str(caught.value) == message


# Arguments


def test_averages_count_a_new_batch_as_told() -> None:
    config = eq.ActivationConfig(observer="moving_average", observer_args={"averaging_constant": 0.25})
    quantizer = settled(config, torch.tensor([0.0, 4.0]), torch.tensor([0.0, 8.0]))
    assert float(quantizer.grid()[0]) == pytest.approx(5.0 / 255)


def test_fewer_bins_find_a_coarser_range() -> None:
    heavy = SKEWED**3
    few, many, default = (
        settled(eq.ActivationConfig(observer_args=args), heavy).grid() for args in ({"bins": 16}, {"bins": 2048}, ())
    )
    observer = HistogramObserver(bins=16)
    observer(heavy)
    assert float(few[0]) == pytest.approx(float(observer.calculate_qparams()[0]), rel=1e-6)
    assert torch.equal(many[0], default[0]) and not torch.equal(few[0], default[0])


def test_a_percentile_leaves_out_what_it_is_told_to() -> None:
    ramp = torch.arange(1, 1001).float()
    config = eq.ActivationConfig(observer="percentile", observer_args={"percentile": 90})
    # The histogram's bins are 1/8 octave wide at worst, and the quantile is interpolated inside one: 1 %.
    assert float(settled(config, ramp).grid()[0]) * 255 == pytest.approx(900, rel=0.01)


def weight_scales(**settings: Any) -> dict[str, Tensor]:
    """The weight scales of a calibrated SmallNet."""
    torch.manual_seed(0)
    qconfig = eq.QConfig(weight=eq.WeightConfig(**settings))
    sim = eq.calibrate(eq.prepare(shake(SmallNet()).eval(), IMAGE, qconfig_mapping=qconfig), [IMAGE])
    return {name: q.scale_of(sim.get_parameter(name)).detach() for name, q in sim.weight_quantizers().items()}


def test_a_weight_percentile_clips_what_it_is_told_to() -> None:
    clipped = weight_scales(observer="percentile", observer_args={"percentile": 60.0})
    for name, scale in weight_scales().items():
        assert bool((clipped[name] < scale).all()), name


@pytest.mark.parametrize("observer", ["minmax", "mse"])
def test_eps_is_the_smallest_weight_scale(observer: str) -> None:
    plain = weight_scales(observer=observer)
    eps = float(torch.cat(list(plain.values())).median())
    for name, scale in weight_scales(observer=observer, observer_args={"eps": eps}).items():
        assert torch.equal(scale, plain[name].clamp_min(eps)), name
    assert math.isfinite(eps)
