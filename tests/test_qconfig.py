from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import nn
from torch.ao.quantization import (
    FakeQuantize,
    FixedQParamsFakeQuantize,
    HistogramObserver,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    PerChannelMinMaxObserver,
    PlaceholderObserver,
    default_fixed_qparams_range_0to1_observer,
    get_default_qat_qconfig,
)
from torch.ao.quantization import QConfig as TorchQConfig
from torch.ao.quantization import QConfigMapping as TorchQConfigMapping

import edgeqat as eq
from edgeqat.errors import PlanError
from edgeqat.qconfig_mapping import LayerId, as_mapping
from edgeqat.qconfig_torch import as_qconfig
from edgeqat.zoo import edge_model

FOUR, FIVE, SIX, SEVEN = (eq.QConfig(weight=eq.WeightConfig(bits=b)) for b in (4, 5, 6, 7))


def test_a_name_beats_a_regex_beats_a_type_beats_the_global_one() -> None:
    mapping = (
        eq.QConfigMapping()
        .set_global(FOUR)
        .set_object_type(nn.Conv2d, FIVE)
        .set_module_name_regex(r"layer1\..*", SIX)
        .set_module_name("layer1.0.conv1", SEVEN)
    )
    assert mapping.lookup(LayerId("fc", "Linear")) == FOUR
    assert mapping.lookup(LayerId("conv1", "Conv2d")) == FIVE
    assert mapping.lookup(LayerId("layer1.1.conv1", "Conv2d")) == SIX
    assert mapping.lookup(LayerId("layer1.0.conv1", "Conv2d")) == SEVEN


def test_a_name_covers_all_below_it_and_the_nearest_counts() -> None:
    mapping = eq.QConfigMapping().set_module_name("layer1", None).set_module_name("layer1.0", FIVE)
    assert mapping.lookup(LayerId("layer1.1.conv1", "Conv2d")) is None
    assert mapping.lookup(LayerId("layer1.0.conv1", "Conv2d")) == FIVE
    assert mapping.lookup(LayerId("layer10.conv", "Conv2d")) == eq.QConfig()


def article_qconfig(weight_scheme: torch.qscheme) -> TorchQConfig:
    return TorchQConfig(
        activation=FakeQuantize.with_args(
            observer=HistogramObserver, quant_min=0, quant_max=255, dtype=torch.quint8, reduce_range=False
        ),
        weight=FakeQuantize.with_args(
            observer=MinMaxObserver, quant_min=-128, quant_max=127, dtype=torch.qint8, qscheme=weight_scheme
        ),
    )


def test_the_article_s_mapping_is_translated() -> None:
    mapping = as_mapping(
        TorchQConfigMapping()
        .set_global(article_qconfig(torch.per_channel_symmetric))  # which torch.ao rejects at run time
        .set_object_type(nn.Linear, article_qconfig(torch.per_tensor_symmetric))
        .set_module_name("fc", None)
    )
    conv, linear = mapping.lookup(LayerId("conv1", "Conv2d")), mapping.lookup(LayerId("head", "Linear"))
    assert conv == eq.QConfig(eq.ActivationConfig(observer="histogram"), eq.WeightConfig(per_channel=True))
    assert linear == eq.QConfig(eq.ActivationConfig(observer="histogram"), eq.WeightConfig(per_channel=False))
    assert mapping.lookup(LayerId("fc", "Linear")) is None
    planned = eq.plan(edge_model(), torch.zeros(1, 3, 32, 32), qconfig_mapping=mapping)
    assert [o.module for o in planned.program.float_origins()] == ["fc"]


def test_torch_s_default_qat_qconfig_is_translated() -> None:
    found = as_qconfig(get_default_qat_qconfig("qnnpack"))
    assert found == eq.QConfig(eq.ActivationConfig(observer="moving_average"), eq.WeightConfig(per_channel=False))


def test_plain_observers_are_translated() -> None:
    found = as_qconfig(
        TorchQConfig(
            activation=MovingAverageMinMaxObserver.with_args(dtype=torch.quint8),
            weight=PerChannelMinMaxObserver.with_args(dtype=torch.qint8, qscheme=torch.per_channel_symmetric),
        )
    )
    assert found == eq.QConfig(eq.ActivationConfig(observer="moving_average"), eq.WeightConfig(per_channel=True))


WEIGHT = MinMaxObserver.with_args(dtype=torch.qint8, qscheme=torch.per_tensor_symmetric)


def fails() -> None:
    raise OSError("no\nfile")


class Own:
    """An observer of no library."""

    quant_min, quant_max = 0, 15

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def calculate_qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.ones(1), torch.zeros(1)


@pytest.mark.parametrize("name", ["minmax", "moving_average", "histogram", "percentile", "mse"])
def test_activation_observers_have_names(name: str) -> None:
    config = eq.ActivationConfig(observer=name)
    assert config.observer_name == name and config == eq.ActivationConfig(observer=name)


@pytest.mark.parametrize("name", ["minmax", "mse", "percentile"])
def test_weight_observers_have_names(name: str) -> None:
    assert eq.WeightConfig(observer=name).observer == name


@pytest.mark.parametrize(
    ("factory", "name"),
    [
        (Own, "Own"),
        (functools.partial(Own), "Own"),
        (HistogramObserver.with_args(bins=512), "HistogramObserver"),
        (FakeQuantize.with_args(observer=HistogramObserver, quant_min=0, quant_max=255), "HistogramObserver"),
        (lambda: Own(), "<lambda>"),
        (HistogramObserver.with_args(bins=512).with_args(eps=0.01), "HistogramObserver"),
        (
            FixedQParamsFakeQuantize.with_args(observer=default_fixed_qparams_range_0to1_observer),
            "FixedQParamsObserver",
        ),
    ],
)
def test_an_observer_may_be_what_makes_one(factory: Any, name: str) -> None:
    config = eq.ActivationConfig(observer=factory)
    assert config.observer_name == name
    assert config == eq.ActivationConfig(observer=factory) and hash(config) == hash(eq.ActivationConfig(8, factory))
    assert config != eq.ActivationConfig() and config != eq.ActivationConfig(observer=lambda: Own())


@pytest.mark.parametrize(
    ("factory", "bits"),
    [
        (Own, 4),
        (HistogramObserver.with_args(eps=0.01), 8),
        (default_fixed_qparams_range_0to1_observer, 8),
        (FixedQParamsFakeQuantize.with_args(observer=default_fixed_qparams_range_0to1_observer), 8),
    ],
    ids=["own class", "smallest scale", "fixed grid", "faked fixed grid"],
)
def test_what_has_no_name_of_ours_stays_a_factory(factory: Any, bits: int) -> None:
    found = as_qconfig(TorchQConfig(activation=factory, weight=WEIGHT))
    assert found == eq.QConfig(eq.ActivationConfig(bits=bits, observer=factory), eq.WeightConfig(per_channel=False))


def test_a_class_that_only_shares_its_name_with_torch_s_is_not_taken_for_it() -> None:
    factory = type("MinMaxObserver", (Own,), {})
    found = as_qconfig(TorchQConfig(activation=factory, weight=WEIGHT))
    assert found is not None and found.activation.observer is factory


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: eq.ActivationConfig(bits=9), "found bits=9, wanted 2 to 8"),
        (lambda: eq.ActivationConfig(observer="guess"), "found observer 'guess', wanted one of minmax"),
        (lambda: eq.ActivationConfig(observer=3), "found observer 3, wanted one of minmax"),
        (
            lambda: eq.ActivationConfig(observer=MinMaxObserver()),
            "found a MinMaxObserver as observer, .*pass the class",
        ),
        (lambda: eq.WeightConfig(observer="histogram"), "found observer 'histogram', wanted one of minmax, mse"),
        (lambda: eq.WeightConfig(observer=Own), "wanted one of minmax, mse, percentile"),
        (lambda: as_qconfig(TorchQConfig(activation=Own, weight=Own)), "found the weight observer Own, wanted one of"),
        (
            lambda: as_qconfig(TorchQConfig(activation=fails, weight=WEIGHT)),
            "^the observer factory fails failed: OSError: no file$",
        ),
        (
            lambda: as_qconfig(
                TorchQConfig(
                    activation=PlaceholderObserver.with_args(dtype=torch.quint8, is_dynamic=True), weight=WEIGHT
                )
            ),
            "found the observer PlaceholderObserver of dynamic torch.quint8, wanted static",
        ),
        (lambda: as_qconfig("int8"), "found a str as QConfig"),
        (lambda: eq.QConfigMapping().set_module_name_regex("(", None), r"found the regex '\('"),
        (
            lambda: as_qconfig(
                TorchQConfig(activation=PlaceholderObserver.with_args(dtype=torch.float16), weight=MinMaxObserver)
            ),
            "found the observer PlaceholderObserver",
        ),
        (
            lambda: as_qconfig(
                TorchQConfig(activation=MinMaxObserver, weight=MinMaxObserver.with_args(dtype=torch.qint8))
            ),
            "wanted a symmetric one",
        ),
    ],
    ids=[
        "bits",
        "observer",
        "no name",
        "instance",
        "weight observer",
        "weight factory",
        "weight class",
        "failing factory",
        "dynamic",
        "no qconfig",
        "regex",
        "placeholder",
        "affine weight",
    ],
)
def test_what_has_no_counterpart_is_refused_by_name(make: object, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        make()  # type: ignore[operator]


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        (eq.QConfigMapping().set_module_name("fcc", None), "module 'fcc' matches nothing; did you mean 'fc'"),
        (eq.QConfigMapping().set_module_name_regex("block", None), "regex 'block' matches no module"),
        (eq.QConfigMapping().set_object_type("Conv3d", None), "type 'Conv3d' matches nothing; did you mean 'Conv2d'"),
    ],
    ids=["name", "regex", "type"],
)
def test_a_rule_that_matches_nothing_is_an_error(mapping: eq.QConfigMapping, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        eq.plan(edge_model(), torch.zeros(1, 3, 32, 32), qconfig_mapping=mapping)
