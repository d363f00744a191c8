"""torch.ao.quantization objects in our own words: every setting is translated, or refused by name."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.ao.quantization import (
    FakeQuantize,
    HistogramObserver,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    NoopObserver,
    PerChannelMinMaxObserver,
    PlaceholderObserver,
    ReuseInputObserver,
    default_symmetric_qnnpack_qconfig,
    default_weight_only_qconfig,
    get_default_qat_qconfig,
    get_default_qat_qconfig_mapping,
    get_default_qconfig_mapping,
)
from torch.ao.quantization import QConfig as TorchQConfig
from torch.ao.quantization import QConfigMapping as TorchQConfigMapping
from torch.ao.quantization._learnable_fake_quantize import _LearnableFakeQuantize

import edgeqat as eq
from edgeqat.errors import PlanError
from edgeqat.qconfig_mapping import LayerId, as_mapping
from edgeqat.qconfig_torch import as_qconfig
from models import SmallNet, shake

IMAGE = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
WEIGHT = MinMaxObserver.with_args(dtype=torch.qint8, qscheme=torch.per_tensor_symmetric)
ACTIVATION = MinMaxObserver.with_args(dtype=torch.quint8)
SYMMETRIC, PER_CHANNEL = torch.per_tensor_symmetric, torch.per_channel_symmetric


def activation_of(factory: Any) -> eq.ActivationConfig:
    """What an activation's factory is translated to."""
    found = as_qconfig(TorchQConfig(activation=factory, weight=WEIGHT))
    assert found is not None and found.output is None
    return found.activation


def weight_of(factory: Any) -> eq.WeightConfig:
    """What a weight's factory is translated to."""
    found = as_qconfig(TorchQConfig(activation=ACTIVATION, weight=factory))
    assert found is not None
    return found.weight


@pytest.mark.parametrize(
    ("factory", "expected"),
    [
        (MinMaxObserver, eq.ActivationConfig(observer="minmax")),
        (
            MinMaxObserver.with_args(dtype=torch.qint8),
            eq.ActivationConfig(observer="minmax", signed=True),
        ),
        (
            MinMaxObserver.with_args(dtype=torch.quint8, qscheme=SYMMETRIC),
            eq.ActivationConfig(observer="minmax", symmetric=True),
        ),
        (
            FakeQuantize.with_args(
                observer=MinMaxObserver, dtype=torch.qint8, qscheme=SYMMETRIC, quant_min=-8, quant_max=7
            ),
            eq.ActivationConfig(4, "minmax", symmetric=True, signed=True),
        ),
        (
            HistogramObserver.with_args(bins=512),
            eq.ActivationConfig(observer_args={"bins": 512}),
        ),
        (
            FakeQuantize.with_args(observer=MovingAverageMinMaxObserver, averaging_constant=0.5),
            eq.ActivationConfig(observer="moving_average", observer_args={"averaging_constant": 0.5}),
        ),
        (
            _LearnableFakeQuantize.with_args(observer=MinMaxObserver, quant_min=0, quant_max=255),
            eq.ActivationConfig(observer="minmax", learned=True),
        ),
        (ReuseInputObserver, eq.ActivationConfig(observer="reuse_input")),
    ],
    ids=["class", "qint8", "symmetric", "four bits", "bins", "averaging constant", "learned", "reuse input"],
)
def test_activations(factory: Any, expected: eq.ActivationConfig) -> None:
    assert activation_of(factory) == expected


PLAIN = {"dtype": torch.qint8, "qscheme": PER_CHANNEL}


@pytest.mark.parametrize(
    ("factory", "expected"),
    [
        (WEIGHT, eq.WeightConfig(per_channel=False)),
        (PerChannelMinMaxObserver.with_args(**PLAIN), eq.WeightConfig()),
        (MinMaxObserver.with_args(**PLAIN), eq.WeightConfig()),
        (MinMaxObserver.with_args(**PLAIN, quant_min=-8, quant_max=7), eq.WeightConfig(4)),
        (MinMaxObserver.with_args(qscheme=PER_CHANNEL).with_args(dtype=torch.qint8), eq.WeightConfig()),
        (FakeQuantize.with_args(observer=MinMaxObserver, **PLAIN, quant_min=-128, quant_max=127), eq.WeightConfig()),
        (
            FakeQuantize.with_args(
                observer=MinMaxObserver.with_args(qscheme=PER_CHANNEL), dtype=torch.qint8, quant_min=-8, quant_max=7
            ),
            eq.WeightConfig(4),
        ),
        (
            _LearnableFakeQuantize.with_args(observer=MinMaxObserver, **PLAIN, quant_min=-128, quant_max=127),
            eq.WeightConfig(learned=True),
        ),
        (WEIGHT.with_args(eps=2**-12), eq.WeightConfig(per_channel=False, observer_args={"eps": 2**-12})),
    ],
    ids=[
        "per tensor",
        "per channel",
        "min-max per channel",
        "four bits",
        "told twice",
        "faked",
        "told inside",
        "learned",
        "eps",
    ],
)
def test_weights(factory: Any, expected: eq.WeightConfig) -> None:
    """MinMaxObserver with a per-channel scheme, which torch.ao rejects when it is made, works wherever it stands."""
    assert weight_of(factory) == expected


class MinMaxObserverOfOurs(MinMaxObserver):
    """Not torch's."""


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: activation_of(PerChannelMinMaxObserver),
            "found the observer PerChannelMinMaxObserver with torch.per_channel_affine for activations, wanted "
            "torch.per_tensor_affine or torch.per_tensor_symmetric: an activation has one scale",
        ),
        (
            lambda: activation_of(HistogramObserver.with_args(qscheme=PER_CHANNEL)),
            "found the observer HistogramObserver with torch.per_channel_symmetric for activations, wanted "
            "torch.per_tensor_affine or torch.per_tensor_symmetric: an activation has one scale",
        ),
        (
            lambda: activation_of(MinMaxObserver.with_args(dtype=torch.qint8, quant_min=-127, quant_max=127)),
            "found the observer MinMaxObserver with the integers -127 .. 127, wanted 2**bits of them, such as 0 .. 255"
            ": integer kernels clamp to nothing else",
        ),
        (
            lambda: activation_of(torch.nn.Identity),
            "found Identity as observer of activations, which finds no range",
        ),
        (
            lambda: activation_of(PlaceholderObserver.with_args(dtype=torch.quint8)),
            "found PlaceholderObserver as observer of activations, which finds no range",
        ),
        (
            lambda: activation_of(MinMaxObserver.with_args(dtype=torch.qint32)),
            "found the observer MinMaxObserver of torch.qint32, wanted static quantization to 8 bits or less",
        ),
        (
            lambda: as_qconfig(default_weight_only_qconfig),
            "found Identity as observer of activations, which finds no range",
        ),
        (
            lambda: weight_of(HistogramObserver.with_args(dtype=torch.qint8, qscheme=SYMMETRIC)),
            "found the weight observer HistogramObserver, wanted one of MinMaxObserver, PerChannelMinMaxObserver, "
            "MovingAverageMinMaxObserver, MovingAveragePerChannelMinMaxObserver; edgeqat.WeightConfig has mse and "
            "percentile",
        ),
        (
            lambda: weight_of(MinMaxObserver.with_args(dtype=torch.qint8, qscheme=torch.per_channel_affine)),
            "found the weight scheme torch.per_channel_affine, wanted a symmetric one: affine weights run "
            "nowhere fast",
        ),
        (
            lambda: weight_of(PerChannelMinMaxObserver.with_args(**PLAIN, ch_axis=1)),
            "found the weight observer PerChannelMinMaxObserver with ch_axis=1, wanted 0: a scale an output channel",
        ),
        (
            lambda: weight_of(MinMaxObserver.with_args(qscheme=torch.per_channel_affine_float_qparams)),
            "the observer factory MinMaxObserver failed: NotImplementedError: MinMaxObserver's qscheme only support "
            "torch.per_tensor_symmetric and torch.per_tensor_affine.",
        ),
    ],
    ids=[
        "per channel",
        "per-channel histogram",
        "127",
        "no observer",
        "placeholder",
        "qint32",
        "weight only",
        "weight histogram",
        "affine",
        "axis",
        "float qparams",
    ],
)
def test_what_has_no_counterpart_is_refused_by_name(make: Any, message: str) -> None:
    with pytest.raises(PlanError) as caught:
        make()
    assert str(caught.value) == message


def test_a_class_of_one_s_own_stays_a_factory_whatever_it_inherits() -> None:
    assert activation_of(MinMaxObserverOfOurs).observer is MinMaxObserverOfOurs


# Default mappings


def quietly(make: Any, backend: str) -> TorchQConfigMapping:
    """A default mapping, without torch.ao's warnings of deprecation and of this processor."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = make(backend)
    assert isinstance(found, TorchQConfigMapping)
    return found


@pytest.mark.parametrize(
    ("make", "observer"),
    [(get_default_qconfig_mapping, "histogram"), (get_default_qat_qconfig_mapping, "moving_average")],
    ids=["ptq", "qat"],
)
@pytest.mark.parametrize("backend", ["qnnpack", "onednn"])
def test_default_mappings_plan_a_model_as_their_global_qconfig_does(make: Any, observer: str, backend: str) -> None:
    expected = eq.QConfig(eq.ActivationConfig(observer=observer), eq.WeightConfig(per_channel=backend == "onednn"))
    planned, ours = (eq.plan(SmallNet(), IMAGE, "torchscript", m) for m in (quietly(make, backend), expected))
    assert planned.program.plan_hash == ours.program.plan_hash
    assert (planned.activations, planned.weights) == (ours.activations, ours.weights)


@pytest.mark.parametrize(
    ("make", "observer"),
    [(get_default_qconfig_mapping, "histogram"), (get_default_qat_qconfig_mapping, "moving_average")],
    ids=["ptq", "qat"],
)
@pytest.mark.parametrize("backend", ["x86", "fbgemm"])
def test_default_mappings_of_reduced_range_have_seven_bits_of_weights(make: Any, observer: str, backend: str) -> None:
    expected = eq.QConfig(eq.ActivationConfig(observer=observer), eq.WeightConfig(bits=7))
    planned, ours = (eq.plan(SmallNet(), IMAGE, "torchscript", m) for m in (quietly(make, backend), expected))
    assert planned.program.plan_hash == ours.program.plan_hash
    assert (planned.activations, planned.weights) == (ours.activations, ours.weights)


@pytest.mark.parametrize(
    ("factory", "bits", "signed"),
    [
        (MinMaxObserver.with_args(reduce_range=True), 8, False),
        (MinMaxObserver.with_args(reduce_range=True, dtype=torch.qint8), 8, True),
        (MinMaxObserver.with_args(reduce_range=True, quant_min=0, quant_max=15), 4, False),
    ],
    ids=["quint8", "qint8", "four bits"],
)
def test_a_reduced_range_is_a_bit_less_of_the_weights_instead(factory: Any, bits: int, signed: bool) -> None:
    found = as_qconfig(TorchQConfig(activation=factory, weight=WEIGHT))
    assert found is not None
    assert (found.activation.bits, found.activation.signed, found.weight.bits) == (bits, signed, 7)
    narrow = WEIGHT.with_args(quant_min=-8, quant_max=7)
    found = as_qconfig(TorchQConfig(activation=factory, weight=narrow))
    assert found is not None and found.weight.bits == 4


def test_the_default_of_the_article_cannot_saturate() -> None:
    model = shake(SmallNet()).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        qconfig = get_default_qat_qconfig("fbgemm")
    sim = eq.prepare(model, IMAGE, qconfig_mapping=qconfig)
    program = eq.convert(eq.calibrate(sim, [IMAGE]))
    assert not [found for found in eq.hazards(program) if found.kind == "saturation"]


class Reshaped(nn.Module):
    """Ops that the default mappings have rules of their own for."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 4, 3), nn.LayerNorm(36), nn.Linear(36, 4)
        self.prelu = nn.PReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).reshape(-1, 4, 36)
        return torch.sigmoid(self.fc(self.prelu(self.norm(x)).mean(1)))


def test_rules_for_what_a_model_has_do_not_keep_it_from_being_planned() -> None:
    mapping = quietly(get_default_qconfig_mapping, "onednn")
    planned = eq.plan(Reshaped(), torch.randn(2, 3, 8, 8), "torchscript", mapping)
    reshape = next(op for op in planned.program.ops if "reshape" in op.name)
    assert planned.program.grid_of(reshape.name) is planned.program.grid_of("conv")


def test_a_default_rule_without_counterpart_is_refused_where_it_matches() -> None:
    mapping = as_mapping(quietly(get_default_qconfig_mapping, "onednn"))
    assert mapping.lookup(LayerId("norm", "LayerNorm", "layer_norm")) == eq.QConfig()
    with pytest.raises(PlanError) as caught:
        mapping.lookup(LayerId("act", "PReLU", "prelu"))
    assert str(caught.value) == (
        "act (PReLU): found the weight scheme torch.per_tensor_affine, wanted a symmetric one: affine weights run "
        "nowhere fast"
    )


def test_a_rule_that_the_user_adds_to_a_default_mapping_must_match() -> None:
    mapping = quietly(get_default_qconfig_mapping, "onednn").set_object_type(nn.Conv3d, None)
    with pytest.raises(PlanError, match="the rule for type 'Conv3d' matches nothing; did you mean 'Conv2d'"):
        eq.plan(SmallNet(), IMAGE, qconfig_mapping=mapping)
    alone = TorchQConfigMapping().set_object_type(nn.Tanh, None)
    with pytest.raises(PlanError, match="the rule for type 'Tanh' matches nothing"):
        eq.plan(SmallNet(), IMAGE, qconfig_mapping=alone)


def test_a_user_s_rule_without_counterpart_is_refused_at_once() -> None:
    affine = TorchQConfig(activation=ACTIVATION, weight=MinMaxObserver.with_args(dtype=torch.qint8))
    with pytest.raises(PlanError, match=r"^found the weight scheme torch.per_tensor_affine"):
        as_mapping(TorchQConfigMapping().set_object_type(nn.PReLU, affine))


def test_two_spellings_of_one_op_with_different_qconfigs_contradict_each_other() -> None:
    one = TorchQConfig(activation=ACTIVATION, weight=WEIGHT)
    other = TorchQConfig(activation=HistogramObserver, weight=WEIGHT)
    with pytest.raises(PlanError) as caught:
        as_mapping(TorchQConfigMapping().set_object_type(torch.sigmoid, one).set_object_type("sigmoid_", other))
    assert str(caught.value) == (
        "the function sigmoid and 'sigmoid_' are one op, 'sigmoid', and have different QConfigs; give them one"
    )
    same = TorchQConfigMapping().set_object_type(F.relu, one).set_object_type("relu", TorchQConfig(*one))
    assert as_mapping(same).lookup(LayerId("", "Net", "relu")) == as_qconfig(one)


def test_a_weight_that_torch_leaves_in_float_is_refused() -> None:
    with pytest.raises(PlanError, match="found the weight observer NoopObserver, wanted one of"):
        weight_of(NoopObserver)


@pytest.mark.parametrize("make", [get_default_qconfig_mapping, get_default_qat_qconfig_mapping], ids=["ptq", "qat"])
def test_a_fixed_grid_is_that_of_the_observer(make: Any) -> None:
    tanh = quietly(make, "onednn").object_type_qconfigs[nn.Tanh]
    torch.manual_seed(0)
    model = shake(SmallNet()).eval()
    sim = eq.calibrate(eq.prepare(model, IMAGE, qconfig_mapping=eq.QConfigMapping().set_global(tanh)), [IMAGE])
    assert eq.convert(sim).grid_of("x:quantized").per_tensor() == (2.0 / 256, 128)


def test_the_symmetric_qnnpack_qconfig_is_translated_whole() -> None:
    found = as_qconfig(default_symmetric_qnnpack_qconfig)
    assert found is not None
    assert found.weight == eq.WeightConfig(per_channel=False, observer_args={"eps": 2**-12})
    assert found.activation.signed and found.activation.observer is default_symmetric_qnnpack_qconfig.activation
