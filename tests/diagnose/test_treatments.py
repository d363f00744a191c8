"""What a choice makes of a `quantize` section, and of the plan behind it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import edgeqat as eq
from edgeqat.diagnose.layers import Layers, layers_of
from edgeqat.diagnose.treatments import (
    BASE,
    FEWER_BITS,
    FLOAT,
    Choice,
    global_treatments,
    section_of,
    treatments_of,
)
from edgeqat.factory import build_mapping
from edgeqat.recipe_quantize import QuantizeSection
from models import SmallNet, shake

EXAMPLE = torch.zeros(2, 3, 8, 8)


def section(**keys: Any) -> QuantizeSection:
    return QuantizeSection.model_validate(keys)


def prepared(base: QuantizeSection) -> eq.SimulatedModel:
    return eq.prepare(shake(SmallNet()).eval(), EXAMPLE, qconfig_mapping=build_mapping(base))


def layers(base: QuantizeSection) -> Layers:
    return layers_of(prepared(base), "onnxruntime")


ADD = "<model> add 0"
SUM = "<model> add 1"


def test_layers_are_named_as_an_override_names_them() -> None:
    found = layers(section())
    assert list(found.by_name) == ["conv1", ADD, "conv2", "conv3", "fc"] or set(found.by_name) >= {
        "conv1",
        "conv2",
        "conv3",
        "fc",
    }
    assert found.by_name["conv2"].selector == {"module": "conv2"}
    assert found.by_name["conv2"].weights == {"conv2.weight": 8 * 8 * 9}
    assert found.by_name[ADD].weights == {}


@pytest.mark.parametrize("name", ["conv1", "conv2", "conv3", "fc", ADD])
def test_float_for_a_layer_leaves_that_layer_alone_in_float(name: str) -> None:
    found = layers(section())
    choice = BASE.treating({name: FLOAT})
    plan = prepared(section_of(section(), found, choice)).plan
    left = layers_of(prepared(section_of(section(), found, choice)), "onnxruntime")
    assert set(found.by_name) - set(left.by_name) == {name}
    assert all(origin.reason for origin in plan.program.float_origins())


def test_layers_around_a_value_are_those_that_make_and_read_it() -> None:
    sim = prepared(section())
    found = layers_of(sim, "onnxruntime")
    for value, names in found.around.items():
        choice = BASE.treating(dict.fromkeys(names, FLOAT))
        changed = prepared(section_of(section(), found, choice))
        assert value not in changed.activation_quantizers(), value
        assert value not in changed.weight_quantizers(), value
    assert set(found.around) == {*sim.activation_quantizers(), *sim.weight_quantizers()}


def test_treatments_are_those_that_change_something() -> None:
    base = section(
        weights={"bits": 4, "observer": "mse"},
        overrides=[
            {"module": "conv2", "weights": {}, "activations": {"observer": "mse"}},
            {"module": "conv3", "quantize": False},
        ],
    )
    found = layers(section())
    assert treatments_of(base, found, "conv1") == ("mse", "percentile", "8 bits", FLOAT)
    assert treatments_of(base, found, "conv2") == ("mse", "percentile", FLOAT)
    assert treatments_of(base, found, "conv3") == ()
    assert treatments_of(base, found, ADD) == ("mse", "percentile", FLOAT)
    assert treatments_of(base, found, ADD, ("mse",)) == ("percentile", FLOAT)


def test_a_choice_wins_over_the_overrides_of_the_recipe() -> None:
    """Also over one of an op by its index, the strongest of all rules, and what it does not touch stays."""
    base = section(
        weights={"bits": 5},
        overrides=[
            {"regex": "", "type": "add", "index": 0, "activations": {"observer": "minmax"}},
            {"module": "conv1", "weights": {"bits": 6}},
            {"regex": "conv.*", "weights": {"bits": 7}},
        ],
    )
    found = layers(base)
    choice = BASE.treating({ADD: "percentile", "conv1": "mse", "conv2": FEWER_BITS, "fc": "8 bits"})
    plan = prepared(section_of(base, found, choice)).plan
    assert {name: plan.weights[f"{name}.weight"].bits for name in ("conv1", "conv2", "conv3", "fc")} == {
        "conv1": 6,
        "conv2": 4,
        "conv3": 7,
        "fc": 8,
    }
    assert plan.weights["conv1.weight"].observer == plan.weights["conv2.weight"].observer == "mse"
    assert plan.weights["conv3.weight"].observer == "minmax"
    assert "percentile" in {config.observer for config in plan.activations.values()}
    assert "minmax" not in {config.observer for config in plan.activations.values()}


def test_global_treatments_leave_overrides_as_they_are() -> None:
    base = section(overrides=[{"module": "conv2", "activations": {"observer": "minmax"}}])
    assert global_treatments(base) == (("mse", "percentile"), ("equalize",))
    made = section_of(base, layers(base), Choice(globally=("mse",)))
    assert (made.weights.observer, made.activations.observer) == ("mse", "mse")
    assert made.overrides == base.overrides
    assert global_treatments(made) == (("percentile",), ("equalize",))
    assert global_treatments(section(batch_norm="live")) == (("mse", "percentile"), ())
    assert section_of(base, layers(base), Choice(globally=("equalize",))).ptq.equalize


def test_the_section_of_the_base_is_the_base() -> None:
    base = section(overrides=[{"module": "conv2", "quantize": False}])
    assert section_of(base, layers(section()), BASE) == base


def test_a_choice_is_told_in_words() -> None:
    assert BASE.describe() == "as it is"
    assert Choice(("mse",), (("conv1", FLOAT), ("fc", "8 bits"))).describe() == "mse; conv1 float, fc 8 bits"
    assert BASE.treating({"b": FLOAT, "a": "mse"}).treating({"b": None}) == Choice(layers=(("a", "mse"),))


def test_a_first_or_last_layer_keeps_the_bits_that_it_has_as_such() -> None:
    """An override names the layer, which then is a first one no longer."""
    base = section(weights={"bits": 4}, first_last={})
    found = layers(base)
    assert treatments_of(base, found, "conv1") == ("mse", "percentile", FLOAT)
    plan = prepared(section_of(base, found, BASE.treating({"conv1": "mse", "conv2": "mse"}))).plan
    assert {name: plan.weights[f"{name}.weight"].bits for name in ("conv1", "conv2", "conv3", "fc")} == {
        "conv1": 8,
        "conv2": 4,
        "conv3": 4,
        "fc": 8,
    }
