"""The article's QConfigs, on a model that has a linear beside the one left in float: the settings of every layer.

Per-channel symmetric weights from MinMaxObserver are what torch.ao rejects at run time; here they simply work.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.ao.quantization import FakeQuantize, HistogramObserver, MinMaxObserver, QConfig, QConfigMapping

import edgeqat as eq
from edgeqat.zoo import edge_model_with_stubs

IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
UINT8 = {"quant_min": 0, "quant_max": 255, "dtype": torch.quint8, "reduce_range": False}
INT8 = {"observer": MinMaxObserver, "quant_min": -128, "quant_max": 127, "dtype": torch.qint8}

HISTOGRAM = QConfig(
    activation=FakeQuantize.with_args(observer=HistogramObserver, **UINT8),
    weight=FakeQuantize.with_args(**INT8, qscheme=torch.per_channel_symmetric),
)
LINEAR = QConfig(
    activation=FakeQuantize.with_args(observer=MinMaxObserver, **UINT8),
    weight=FakeQuantize.with_args(**INT8, qscheme=torch.per_tensor_symmetric),
)
MAPPING = QConfigMapping().set_global(HISTOGRAM).set_object_type(nn.Linear, LINEAR).set_module_name("fc", None)
OWN = (
    eq.QConfigMapping()
    .set_global(eq.QConfig(eq.ActivationConfig(observer="histogram"), eq.WeightConfig(per_channel=True)))
    .set_object_type(nn.Linear, eq.QConfig(eq.ActivationConfig(observer="minmax"), eq.WeightConfig(per_channel=False)))
    .set_module_name("fc", None)
)
FUSIONS = [
    ["entry_block.0", "entry_block.1", "entry_block.2"],
    *(
        [f"{block}.conv.{i}", f"{block}.conv.{i + 1}"]
        for block in ("residual_block", "downsample_block")
        for i in (0, 3, 6)
    ),
]


def model() -> nn.Module:
    """The article's EdgeModel, with a linear before its classifier."""
    torch.manual_seed(0)
    net = edge_model_with_stubs().eval()
    hidden = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Unflatten(1, (64, 1, 1)))
    net.avgpool = nn.Sequential(net.avgpool, hidden)
    return net


@pytest.mark.parametrize("mapping", [MAPPING, OWN], ids=["torch.ao's objects", "ours"])
def test_every_layer_has_the_settings_that_the_article_describes(mapping: object) -> None:
    plan = eq.plan(model(), IMAGES, qconfig_mapping=mapping, fusions=FUSIONS)
    activations = {name: (config.bits, config.observer_name) for name, config in plan.activations.items()}
    convs = [f"{block}.conv.{i}" for block in ("residual_block", "downsample_block") for i in (0, 3, 6)]
    by_histogram = ["x:quantized", "entry_block.0", *convs, "residual_block.add", "avgpool.0"]
    assert activations == dict.fromkeys(by_histogram, (8, "histogram")) | {"avgpool.1.1": (8, "minmax")}
    weights = {name: (w.bits, w.per_channel, w.observer) for name, w in plan.weights.items()}
    wanted = {f"{name}.weight": (8, True, "minmax") for name in ("entry_block.0", *convs)}
    assert weights == wanted | {"avgpool.1.1.weight": (8, False, "minmax")}
    floats = [(row.module, row.reason) for row in plan.rows() if row.runs == "float"]
    assert floats == [("fc (Linear)", "its QConfig is None")]


def test_the_default_of_the_article_fuses_what_it_lists() -> None:
    plan = eq.plan(model(), IMAGES, fusions=FUSIONS)
    fused = {row.op: row.fused for row in plan.rows() if row.kind == "conv"}
    assert fused["entry_block.0"] == "entry_block.1 + relu"
    assert fused["residual_block.conv.6"] == "residual_block.conv.7"


def test_both_mappings_give_one_plan() -> None:
    first, second = (eq.plan(model(), IMAGES, qconfig_mapping=mapping) for mapping in (MAPPING, OWN))
    assert first.diff(second) == "" and first.program.plan_hash == second.program.plan_hash
    assert "1 in float" in first.totals()
