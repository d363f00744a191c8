"""The sensitivity table: planted faults come first, the figures are those of whole runs, and nothing is changed."""

from __future__ import annotations

import copy
import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import edgeqat as eq
from edgeqat.diagnose.effects import Tally
from edgeqat.diagnose.sensitivity import Settings
from edgeqat.diagnose.sensitivity_table import Row
from edgeqat.diagnose.switches import quantizing, switchable
from edgeqat.errors import DataError, InputError, PhaseError, PlanError
from edgeqat.files import to_json
from edgeqat.metrics import METRICS
from edgeqat.reporting.figures.sensitivity import sensitivity_svg
from models import Branches, FloatMiddle

IMAGES = torch.randn(96, 3, 8, 8, generator=torch.Generator().manual_seed(0))
BATCHES = list(IMAGES.split(40))
FACTOR = 1024.0
"""A power of two, so that what is scaled and scaled back is the same to the bit."""


class Chain(nn.Module):
    """Convs with ReLUs, a residual sum, a global pool and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(3, 8, 3, padding=1)
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.conv3 = nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv0(x))
        x = torch.relu(self.conv1(x))
        x = torch.relu(self.conv2(x))
        x = x + torch.relu(self.conv3(x))
        return self.fc(x.mean((2, 3)))


def chain() -> Chain:
    """One whose predictions are spread over the classes."""
    torch.manual_seed(3)
    model = Chain().eval()
    with torch.no_grad():
        model.fc.bias -= model(IMAGES).mean(0)
    return model


def labelled(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Batches whose labels are what the float model predicts."""
    with torch.no_grad():
        return [(batch, model(batch).argmax(1)) for batch in BATCHES]


def calibrated(model: nn.Module) -> eq.SimulatedModel:
    config = eq.QConfig(eq.ActivationConfig(observer="minmax"))
    return eq.calibrate(eq.prepare(model, IMAGES[:2], qconfig_mapping=config), BATCHES)


@pytest.fixture(scope="module")
def table() -> eq.Sensitivity:
    model = chain()
    return eq.sensitivity(calibrated(model), labelled(model), "top1")


def first(table: eq.Sensitivity) -> set[str]:
    """The names that any ranking puts first."""
    ways = [(by, when) for by in ("sqnr", "kl", "metric") for when in ("only", "without")]
    return {table.ranked(*way)[0].unit.name for way in ways}


def row(table: eq.Sensitivity, name: str, part: str) -> Row:
    return next(row for row in table.rows if (row.unit.name, row.unit.part) == (name, part))


@pytest.mark.parametrize("at", [0, 1])
def test_a_channel_of_outliers_is_found(at: int) -> None:
    """One channel a thousand times the others, undone by the weights behind it: the float model stays the same."""
    model = chain()
    labels, wanted = labelled(model), model(IMAGES)
    maker, reader = model.get_submodule(f"conv{at}"), model.get_submodule(f"conv{at + 1}")
    assert isinstance(maker, nn.Conv2d) and maker.bias is not None and isinstance(reader, nn.Conv2d)
    with torch.no_grad():
        maker.weight[5] *= FACTOR
        maker.bias[5] *= FACTOR
        reader.weight[:, 5] /= FACTOR
    assert torch.equal(model(IMAGES), wanted)
    found = eq.sensitivity(calibrated(model), labels, "top1")
    assert first(found) == {f"conv{at}"}
    whole = row(found, f"conv{at}", "layer")
    assert found.parts_of(whole)["output"].only.sqnr.value < found.parts_of(whole)["weight"].only.sqnr.value - 20
    ratios = {r.unit.name: r.ranges.channel_ratio for r in found.rows if r.ranges and r.unit.part == "output"}
    assert max(ratios, key=lambda name: ratios[name] or 0.0) == f"conv{at}"
    assert (ratios[f"conv{at}"] or 0.0) > FACTOR / 8


@pytest.mark.parametrize(("value", "unit"), [("conv1", "conv1"), ("conv3", "conv3"), ("add", "add")])
def test_a_range_that_saturates_is_found(value: str, unit: str) -> None:
    model = chain()
    sim = calibrated(model)
    quantizer = sim.quantizer_of(value)
    scale, zero_point = quantizer.grid()
    quantizer.set_grid(scale / 16, zero_point)
    found = eq.sensitivity(sim, labelled(model), "top1")
    assert first(found) == {unit}
    clipped = {r.unit.name: r.ranges.clipped for r in found.rows if r.ranges and r.unit.part in ("output", "value")}
    assert max(clipped, key=lambda name: clipped[name]) == unit
    assert clipped.pop(unit) > 0.3
    assert set(clipped.values()) == {0.0}


def test_a_weight_on_too_few_bits_is_found() -> None:
    mapping = eq.QConfigMapping().set_module_name("conv2", eq.QConfig(weight=eq.WeightConfig(bits=3)))
    model = chain()
    sim = eq.calibrate(eq.prepare(model, IMAGES[:2], qconfig_mapping=mapping), BATCHES)
    found = eq.sensitivity(sim, BATCHES)
    for when in ("only", "without"):
        assert found.ranked(when=when, parts=("weight", "output", "value"))[0].unit.quantizers == ("conv2.weight",)


def linear() -> nn.Module:
    """Its input and its weight are all that is quantized: without one is only the other."""
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 4)).eval()


@pytest.mark.parametrize("factory", [chain, linear])
def test_each_figure_is_that_of_whole_runs_of_the_simulation(factory: Callable[[], nn.Module]) -> None:
    model = factory()
    sim = calibrated(model).eval()
    batches = labelled(model)
    found = eq.sensitivity(sim, batches, "top1")
    every, settings = switchable(sim), Settings(sim)

    def whole(names: frozenset[str]) -> Tally:
        tally = Tally(METRICS["top1"], True)
        for inputs, targets in batches:
            with torch.no_grad():
                with quantizing(sim, ()):
                    reference = sim(inputs)
                with quantizing(sim, names):
                    tally.add(sim(inputs), reference, targets)
        return tally

    in_float = whole(frozenset())
    assert found.quantized == whole(every).effect(in_float)
    assert found.float_metric == 1.0
    for each in found.rows:
        names = frozenset(each.unit.quantizers)
        assert each.only == whole(names).effect(in_float)
        assert each.without == whole(every - names).effect(in_float)
        assert each.gain is not None and each.only.drop is not None and each.without.drop is not None
        assert found.quantized.drop is not None
        assert each.gain.value == pytest.approx(found.quantized.drop.value - each.without.drop.value)
    assert len(settings) < 2 * len(found.rows)  # a layer's input is another one's output


@pytest.mark.parametrize("phase", ["quantized", "converted"])
def test_the_simulation_is_left_as_it_was_even_by_an_error(phase: str) -> None:
    sim = calibrated(chain())
    if phase == "converted":
        eq.convert(sim)
    sim.train()
    modes = [getattr(module, "mode", None) for module in sim.modules()]
    before, kept = copy.deepcopy(sim.state_dict()), sim(IMAGES)

    def check() -> None:
        assert (sim.phase, sim.training) == (phase, True)
        assert [getattr(module, "mode", None) for module in sim.modules()] == modes
        assert all(torch.equal(before[name], tensor) for name, tensor in sim.state_dict().items())
        assert not any(module._forward_hooks for module in sim.modules())
        assert torch.equal(sim(IMAGES), kept)

    eq.sensitivity(sim, BATCHES)
    check()
    for fail_at in (1, 3, 20):
        runs = iter(range(1, 1000))

        def stop(runs: object = runs, fail_at: int = fail_at) -> None:
            if next(runs) == fail_at:  # type: ignore[call-overload]
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt) as kept_alive:
            eq.sensitivity(sim, BATCHES, on_run=stop)
        check()  # now, not when the last frame of the error is gone
        assert kept_alive.tb is not None


def test_each_batch_is_read_once_and_each_run_told_of() -> None:
    sim, runs = calibrated(chain()), Counter[str]()
    eq.sensitivity(sim, iter(BATCHES), on_run=lambda: runs.update(["run"]))
    assert runs["run"] == len(Settings(sim)) * len(BATCHES)


def test_rows_are_layers_with_their_parts_and_other_values(table: eq.Sensitivity) -> None:
    parts: dict[str, list[str]] = {}
    for each in table.rows:
        parts.setdefault(each.unit.name, []).append(each.unit.part)
    layer = ["layer", "input", "weight", "output"]
    assert parts.pop("fc") == layer[:-1]  # ONNX Runtime's last linear gives float
    assert parts.pop("x:quantized") == parts.pop("add") == parts.pop("mean:pooled") == ["value"]
    assert parts == dict.fromkeys(["conv0", "conv1", "conv2", "conv3"], layer)
    assert {each.unit.module for each in table.rows if each.unit.part == "layer"} == {*parts, "fc"}


def test_a_row_s_module_can_be_left_in_float(table: eq.Sensitivity) -> None:
    worst = table.ranked(parts=["layer"])[0].unit.module
    mapping = eq.QConfigMapping().set_global(eq.QConfig()).set_module_name(worst, None)
    without = eq.calibrate(eq.prepare(chain(), IMAGES[:2], qconfig_mapping=mapping), BATCHES)
    assert f"{worst}.weight" not in switchable(without)
    found = eq.sensitivity(without, BATCHES)
    assert found.quantized.sqnr.value > table.quantized.sqnr.value


def test_ranges_are_those_of_the_values_in_float(table: eq.Sensitivity) -> None:
    model = chain()
    with torch.no_grad():
        y = torch.relu(model.conv0(IMAGES))
    found, weight = row(table, "conv0", "output").ranges, row(table, "conv0", "weight").ranges
    assert found is not None and weight is not None
    step = float((y.amax().double() / 255).float())
    assert (found.low, found.high, found.scale) == pytest.approx((0.0, float(y.max()), step), rel=1e-6)
    assert (found.grid_low, found.grid_high) == pytest.approx((0.0, 255 * step), rel=1e-6)
    assert found.clipped == 0.0
    noise = (torch.round(y / step).clamp(0, 255) * step - y).double()
    assert found.sqnr == pytest.approx(10 * math.log10(float(y.double().square().sum() / noise.square().sum())), 1e-4)
    largest = y.amax((0, 2, 3))
    assert found.channel_ratio == pytest.approx(float(largest.max() / largest.quantile(0.5)))
    typical = float(y[y > 0].quantile(0.999))
    assert found.outlier_ratio == pytest.approx(float(y.max()) / typical, rel=0.07)  # a bin is a sixteenth wide
    own = model.conv0.weight.detach()
    assert (weight.low, weight.high) == (float(own.min()), float(own.max()))
    assert (weight.clipped, weight.channel_ratio) == (0.0, None)


def test_what_is_beyond_the_grid_by_half_a_step_is_not_clipped() -> None:
    sim = calibrated(chain())
    quantizer = sim.quantizer_of("add")
    scale, zero_point = torch.tensor(0.5), torch.tensor(0, dtype=torch.int32)
    quantizer.set_grid(scale, zero_point)
    from edgeqat.diagnose.ranges import RangeTally

    tally = RangeTally(quantizer)
    tally.add(torch.tensor([[-0.26, -0.25, 1.0, 127.5, 127.75, 127.8, 200.0, 3.0]]))
    found = tally.ranges()
    assert found is not None
    assert found.clipped == 3 / 8


def test_several_outputs_and_no_classes() -> None:
    sim = eq.calibrate(eq.prepare(Branches(), (IMAGES[:2], IMAGES[:2])), [(IMAGES, -IMAGES)])
    found = eq.sensitivity(sim, [(IMAGES, -IMAGES)], classes=False)
    assert (found.metric, found.quantized.kl, found.rows[0].gain) == (None, None, None)
    assert row(found, "shared", "output").ranges is None  # one for either call
    with pytest.raises(InputError, match="no figure for by='kl', which wants outputs that are scores of classes"):
        found.ranked("kl")
    with pytest.raises(InputError, match="no figure for by='metric', which wants a metric"):
        found.ranked("metric")
    text = str(found)
    assert "KL" not in text.splitlines()[1]
    assert "without" in text
    assert "<svg" in sensitivity_svg(found)


def test_ranking_is_by_any_figure_and_ties_go_by_sqnr(table: eq.Sensitivity) -> None:
    by_noise = [r.only.sqnr.value for r in table.ranked()]
    assert by_noise == sorted(by_noise)
    recovered = [r.without.sqnr.value for r in table.ranked("sqnr", "without")]
    assert recovered == sorted(recovered, reverse=True)
    divergences = [r.only.kl.value for r in table.ranked("kl") if r.only.kl]
    assert divergences == sorted(divergences, reverse=True)
    even = replace(table, rows=tuple(replace(r, only=replace(r.only, drop=table.rows[0].gain)) for r in table.rows))
    assert [r.unit for r in even.ranked("metric")] == [r.unit for r in even.ranked()]
    assert {r.unit.part for r in table.ranked(parts=["weight"])} == {"weight"}
    with pytest.raises(InputError, match="found by='mse', when='only', wanted sqnr, kl or metric"):
        table.ranked("mse")


def test_it_prints_within_80_columns_and_writes_json(table: eq.Sensitivity) -> None:
    lines = str(table).splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].startswith("96 samples")
    assert "float 100.00%, quantized" in lines[1]
    names = [line.split()[0] for line in lines if line and line.split()[0] in ("conv0", "conv1", "conv2", "conv3")]
    assert set(names) == {"conv0", "conv1", "conv2", "conv3"}
    data = json.loads(to_json(table.to_dict()))
    assert data["schema"] == 1
    assert data["rows"][1]["part"] == "layer"
    assert set(data["rows"][1]) == {"name", "module", "part", "quantizers", "only", "without", "gain", "ranges"}
    assert set(data["rows"][1]["only"]["sqnr"]) == {"value", "standard_error"}


def test_what_has_no_noise_is_null_in_json_and_said_in_print(table: eq.Sensitivity) -> None:
    exact = replace(table.quantized, sqnr=replace(table.quantized.sqnr, value=math.inf))
    found = replace(table, quantized=exact)
    assert found.to_dict()["quantized"]["sqnr"]["value"] is None
    assert "SQNR inf dB" in str(found)


def test_a_long_name_has_a_line_of_its_own(table: eq.Sensitivity) -> None:
    name = "a_module_name." * 6
    renamed = replace(table.rows[0], unit=replace(table.rows[0].unit, name=name))
    lines = str(replace(table, rows=(renamed, *table.rows[1:]))).splitlines()
    assert [len(line) > 80 for line in lines] == [line == name for line in lines]
    assert name in lines


def test_the_figure_is_the_same_for_the_same_table(table: eq.Sensitivity) -> None:
    drawn = sensitivity_svg(table)
    assert drawn == sensitivity_svg(table)
    assert all(f">{name}<" in drawn for name in ("conv0", "add", "fc"))


def test_refusals() -> None:
    model = chain()
    with pytest.raises(PhaseError, match="in phase float; call edgeqat.calibrate"):
        eq.sensitivity(eq.prepare(model, IMAGES[:2]), BATCHES)
    sim = calibrated(model)
    with pytest.raises(DataError, match="found no batches to analyse on"):
        eq.sensitivity(sim, [])
    with pytest.raises(DataError, match="found 1 samples to analyse on"):
        eq.sensitivity(sim, [IMAGES[:1]])
    with pytest.raises(InputError, match="found the metric 'f1'"):
        eq.sensitivity(sim, BATCHES, "f1")
    with pytest.raises(DataError, match="computes NaN or infinity"):
        eq.sensitivity(sim, [IMAGES * math.nan])
    nothing = eq.prepare(FloatMiddle().eval(), IMAGES[:2], qconfig_mapping=eq.QConfigMapping().set_global(None))
    with pytest.raises(PlanError, match="nothing in this model is quantized"):
        eq.sensitivity(nothing, BATCHES)
