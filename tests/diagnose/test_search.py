"""Searches on a network that works until a fault is planted in it."""

from __future__ import annotations

import functools
import gc
import json
from pathlib import Path

import pytest
import torch
from faults import SATURATING, batches, digits, find, trained, with_outlier

import edgeqat as eq
from edgeqat.data.batches import Batches
from edgeqat.data.dataset import Split
from edgeqat.diagnose.cheapest import Trial
from edgeqat.diagnose.plan_trials import Material, PlanTrials
from edgeqat.diagnose.treatments import BASE, FEWER_BITS, FLOAT, Choice
from edgeqat.errors import DataError, RecipeError
from edgeqat.factory import build_mapping
from edgeqat.metrics import METRICS, evaluate
from edgeqat.recipe_quantize import QuantizeSection

MAX_DROP = 0.02
BOTH_SIDES = Choice(layers=(("conv3", FLOAT), ("conv4", FLOAT)))


@functools.cache
def saturated() -> eq.SearchResult:
    return find(trained(), MAX_DROP, [SATURATING])


@functools.cache
def with_outlier_in_float() -> eq.SearchResult:
    return find(with_outlier(trained()), MAX_DROP, batch_norm="live")


def top1(model: torch.nn.Module) -> float:
    return float(evaluate(model, batches(digits().test), METRICS["top1"]).statistics.double().mean())


def test_the_planted_faults_change_nothing_in_float_and_ruin_the_quantized_model() -> None:
    plain = trained()
    assert top1(plain) > 0.93
    assert abs(top1(with_outlier(trained())) - top1(plain)) <= 1 / 600
    assert find(trained(), MAX_DROP).best.choice == BASE
    for found in (saturated(), with_outlier_in_float()):
        assert found.base.outcome.drop > 0.5


def test_a_saturating_range_is_mended_by_another_observer_for_that_layer_alone() -> None:
    found = saturated()
    assert found.passed
    assert found.best.choice == Choice(layers=(("conv1", "mse"),))
    assert found.best.cost.file_bytes == found.base.cost.file_bytes


def test_an_outlier_channel_is_mended_by_equalization_without_touching_a_layer() -> None:
    found = find(with_outlier(trained()), MAX_DROP)
    assert found.passed
    assert found.best.choice == Choice(globally=("equalize",))
    assert found.quantize.ptq.equalize


def test_where_that_cannot_be_it_takes_float_on_both_sides_of_the_value_and_nowhere_else() -> None:
    """What reads a float value brings it onto the same grid again, so the layer that makes it is not enough."""
    found = with_outlier_in_float()
    assert found.passed
    assert found.best.choice == BOTH_SIDES
    drops = {trial.choice: trial.outcome.drop for trial in found.trials}
    for side in ("conv3", "conv4"):
        assert drops[BASE.treating({side: FLOAT})] > 0.5


def test_both_faults_at_once() -> None:
    found = find(with_outlier(trained()), MAX_DROP, [SATURATING], batch_norm="live")
    assert found.passed
    assert found.best.choice == BOTH_SIDES.treating({"conv1": "mse"})
    equalized = find(with_outlier(trained()), MAX_DROP, [SATURATING])
    assert equalized.best.choice == Choice(("equalize",), (("conv1", "mse"),))


def test_the_mapping_and_the_section_reproduce_what_was_measured() -> None:
    found, model, data = with_outlier_in_float(), with_outlier(trained()), digits()
    example = next(iter(batches(data.calibration)))[0][:2]
    sim = eq.prepare(model, example, "onnxruntime", found.mapping, batch_norm="live").eval()
    eq.calibrate(sim, batches(data.calibration).inputs())
    twin = evaluate(model, batches(data.validation), METRICS["top1"])
    with sim.exact("onnxruntime"):
        own = evaluate(sim, batches(data.validation), METRICS["top1"])
    assert METRICS["top1"].drop(twin.statistics, own.statistics).value == found.best.outcome.drop
    again = QuantizeSection.model_validate(found.quantize.model_dump())
    assert again == found.quantize
    planned = eq.plan(model, example, "onnxruntime", build_mapping(again), batch_norm="live")
    assert str(planned) == str(sim.plan)


class Stop(Exception):
    """Stands for a process that is killed."""


@pytest.mark.parametrize("after", [1, 4])
def test_a_search_that_was_stopped_makes_no_trial_twice(tmp_path: Path, after: int) -> None:
    path, whole = tmp_path / "trials.jsonl", with_outlier_in_float()
    told: list[Trial] = []

    def stop(trial: Trial, _: object) -> None:
        told.append(trial)
        if len(told) == after:
            raise Stop

    with pytest.raises(Stop):
        find(with_outlier(trained()), MAX_DROP, batch_norm="live", log=path, on_trial=stop)
    before = path.read_text()
    resumed = find(with_outlier(trained()), MAX_DROP, batch_norm="live", log=path)
    after_it = path.read_text()
    assert after_it.startswith(before)
    assert (resumed.best, resumed.trials) == (whole.best, whole.trials)
    lines = [json.loads(line) for line in after_it.splitlines()]
    assert len({line["key"] for line in lines}) == len(lines)
    assert sum(line["kind"] == "trial" for line in lines) == len(whole.trials)
    again = find(with_outlier(trained()), MAX_DROP, batch_norm="live", log=path)
    assert (again.trials, path.read_text()) == (whole.trials, after_it)


def test_a_log_of_other_weights_does_not_count(tmp_path: Path) -> None:
    path = tmp_path / "trials.jsonl"
    find(trained(), MAX_DROP, log=str(path))
    before = len(path.read_text().splitlines())
    find(with_outlier(trained()), 1.0, log=path)
    keys = [json.loads(line)["key"] for line in path.read_text().splitlines()]
    assert len(keys) == len(set(keys)) == 2 * before


def test_the_result_says_what_was_tried_and_how_sure_it_is() -> None:
    found = saturated()
    text = str(found)
    assert f"{len(found.trials)} trials" in text
    assert "as it is: drop +" in text
    assert "the cheapest plan that passes: conv1 mse: drop " in text
    assert "points on 119 samples" in text
    drop, error = found.best.outcome.drop, found.best.outcome.standard_error
    assert found.certain == (abs(drop - MAX_DROP) > error)
    assert ("within the standard error" in text) == (not found.certain)


def test_limits_that_no_plan_meets_end_with_the_nearest() -> None:
    found = find(trained(), -0.5, [SATURATING], max_trials=6)
    assert not found.passed
    assert found.why == "it ended after 6 trials"
    assert found.best.outcome.drop == min(trial.outcome.drop for trial in found.trials)
    assert "no plan passes: it ended after 6 trials; the nearest: " in str(found)


def test_settings_that_do_not_fit_are_refused() -> None:
    with pytest.raises(RecipeError, match="quantize: unknown key weight; did you mean weights"):
        eq.search(trained(), [torch.zeros(2, 3, 8, 8)], [], limits=eq.Limits(), quantize={"weight": {"bits": 4}})


def test_agreement_needs_no_labels() -> None:
    data = digits()
    inputs = [(x, None) for x in batches(data.validation).inputs()]
    calibration, limits = batches(data.calibration).inputs(), eq.Limits(max_drop=0.05)
    found = eq.search(with_outlier(trained()), calibration, inputs, limits=limits, metric="agreement")
    assert found.passed
    assert found.base.outcome.drop > 0.5


def test_the_ranking_blames_the_faults_first() -> None:
    data, model = digits(), with_outlier(trained())
    base = QuantizeSection.model_validate({"overrides": [SATURATING]})
    calibration, held_out = batches(data.calibration).inputs(), batches(data.validation)
    trials = PlanTrials(Material(model, calibration, held_out, base, ["onnxruntime"], METRICS["top1"]))
    first = trials.ranking(BASE)[:2]
    assert ("conv3", "conv4") in first
    assert {"conv1"} < set(first[1 - first.index(("conv3", "conv4"))])


def test_models_that_take_pixels_are_searched_in_pixels() -> None:
    data = digits()
    assert data.mean is not None and data.std is not None

    def pixels(split: Split) -> Batches:
        return Batches(split, batch_size=128, mean=data.mean, std=data.std, pixels=True)

    found = eq.search(
        trained(),
        pixels(data.calibration).inputs(),
        pixels(data.validation),
        limits=eq.Limits(max_drop=MAX_DROP),
        quantize={"overrides": [SATURATING]},
        pixels=eq.Pixels(data.mean, data.std),
    )
    assert found.passed
    assert found.best.choice == Choice(layers=(("conv1", "mse"),))


def test_a_search_that_fails_leaves_gradients_on() -> None:
    """Its batches are read to their end or not: they hold no switch of torch's."""
    data = digits()
    broken = [(inputs, torch.full((len(inputs),), 99)) for inputs, _ in batches(data.validation)]
    with pytest.raises(DataError):
        eq.search(trained(), batches(data.calibration).inputs(), broken, limits=eq.Limits(max_drop=0.0))
    gc.collect()  # what was suspended at the error is closed now, if not before
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_is(training: bool) -> None:
    model = trained().train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    find(model, MAX_DROP, max_trials=1)
    assert model.training == training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_file_that_is_too_large_gets_weights_of_4_bits_where_that_loses_least(tmp_path: Path) -> None:
    data, model = digits(), trained()
    calibration, limits = batches(data.calibration).inputs(), eq.Limits(max_drop=0.05, min_size_ratio=3.3)
    found = eq.search(model, calibration, batches(data.validation), limits=limits)
    assert found.base.cost.size_ratio < 3.3
    assert found.passed
    assert {treatment for _, treatment in found.best.choice.layers} == {FEWER_BITS}
    assert len(found.best.choice.layers) < 4
    sim = eq.prepare(model, next(iter(calibration)), "onnxruntime", found.mapping)
    artifact = eq.lower(eq.convert(eq.calibrate(sim, calibration)), "onnxruntime", tmp_path / "found")
    # Beside weights, a layer of 4 bits has a node more, which unpacks them.
    assert abs(artifact.file_bytes - found.best.cost.file_bytes) < 200 * len(found.best.choice.layers)
