"""The four settings of the article's custom QConfigMapping give every layer what the article describes.

It is written as the article writes it: histograms for activations, per-channel min-max weights (which torch.ao refuses
to make), per-tensor weights and min-max activations for nn.Linear, and the classifier in float.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.ao.quantization import FakeQuantize, HistogramObserver, MinMaxObserver
from torch.ao.quantization import QConfig as TorchQConfig
from torch.ao.quantization import QConfigMapping as TorchQConfigMapping

import edgeqat as eq
from edgeqat.factory import build_mapping
from edgeqat.recipe_quantize import QuantizeSection
from edgeqat.zoo import edge_model
from edgeqat.zoo.edge import EdgeModel, edge_model_with_stubs
from helpers import EXACT_ARITHMETIC
from models import shake

IMAGE = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))


class WithHiddenLinear(EdgeModel):
    """The article's model with one more linear layer ("if we had them"), before the classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, 10]"""
        x = self.downsample_block(self.residual_block(self.entry_block(x)))
        logits: Tensor = self.fc(self.hidden(self.avgpool(x).flatten(1)).relu())
        return logits


def in_torch() -> TorchQConfigMapping:
    """As the article has it."""
    activation: dict[str, Any] = {"quant_min": 0, "quant_max": 255, "dtype": torch.quint8, "reduce_range": False}
    weight: dict[str, Any] = {"quant_min": -128, "quant_max": 127, "dtype": torch.qint8}
    histogram_qconfig = TorchQConfig(
        activation=FakeQuantize.with_args(observer=HistogramObserver, **activation),
        weight=FakeQuantize.with_args(observer=MinMaxObserver, **weight, qscheme=torch.per_channel_symmetric),
    )
    linear_qconfig = TorchQConfig(
        activation=FakeQuantize.with_args(observer=MinMaxObserver, **activation),
        weight=FakeQuantize.with_args(observer=MinMaxObserver, **weight, qscheme=torch.per_tensor_symmetric),
    )
    return (
        TorchQConfigMapping()
        .set_global(histogram_qconfig)
        .set_object_type(nn.Linear, linear_qconfig)
        .set_module_name("fc", None)
    )


HISTOGRAM, MINMAX = eq.ActivationConfig(observer="histogram"), eq.ActivationConfig(observer="minmax")


def in_ours() -> eq.QConfigMapping:
    """The same in edgeqat's classes."""
    return (
        eq.QConfigMapping()
        .set_global(eq.QConfig(HISTOGRAM, eq.WeightConfig(per_channel=True)))
        .set_object_type(nn.Linear, eq.QConfig(MINMAX, eq.WeightConfig(per_channel=False)))
        .set_module_name("fc", None)
    )


def in_yaml() -> eq.QConfigMapping:
    """The same in a recipe."""
    linear = {"type": "Linear", "activations": {"observer": "minmax"}, "weights": {"per_channel": False}}
    return build_mapping(QuantizeSection.model_validate({"overrides": [linear, {"module": "fc", "quantize": False}]}))


MODELS = [edge_model, edge_model_with_stubs, WithHiddenLinear]


@pytest.mark.parametrize("make", MODELS)
def test_torch_s_mapping_makes_the_plan_of_ours_and_of_the_recipe_s(make: Any) -> None:
    model = make().eval()
    torch_s, ours, recipe_s = (
        eq.plan(model, IMAGE, qconfig_mapping=mapping) for mapping in (in_torch(), in_ours(), in_yaml())
    )
    for other in (ours, recipe_s):
        assert str(torch_s) == str(other) and torch_s.diff(other) == ""
        assert torch_s.program.plan_hash == other.program.plan_hash
        assert (torch_s.activations, torch_s.weights) == (other.activations, other.weights)


@pytest.mark.parametrize("make", MODELS)
def test_every_layer_gets_what_the_article_describes(make: Any) -> None:
    model = make().eval()
    planned = eq.plan(model, IMAGE, qconfig_mapping=in_torch())
    modules = dict(model.named_modules())
    convs = {f"{name}.weight" for name, module in modules.items() if isinstance(module, nn.Conv2d)}
    linears = {f"{name}.weight" for name, module in modules.items() if isinstance(module, nn.Linear)} - {"fc.weight"}
    # "The fc layer has no observers attached."
    assert {o.module for o in planned.program.float_origins()} == {"fc"}
    assert set(planned.weights) == convs | linears
    # "activation_post_process for convolutional layers will be a HistogramObserver", weights "per-channel", "while any
    # other nn.Linear layers (if we had them) would use per-tensor quantization".
    for name, weight in planned.weights.items():
        assert weight == eq.WeightConfig(bits=8, per_channel=name in convs, observer="minmax"), name
        limit = planned.program.consts[name].grid.qmax
        assert (planned.program.consts[name].grid.qmin, limit) == (-127, 127), name
    by_linear = {name for name, config in planned.activations.items() if config == MINMAX}
    assert by_linear == {name.removesuffix(".weight") for name in linears}
    assert all(config == HISTOGRAM for name, config in planned.activations.items() if name not in by_linear)


@EXACT_ARITHMETIC
def test_it_calibrates_and_runs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sim = eq.prepare(shake(WithHiddenLinear()).eval(), IMAGE, qconfig_mapping=in_torch())
    program = eq.convert(eq.calibrate(sim, [IMAGE]))
    parity = eq.verify(eq.lower(program, "onnxruntime", tmp_path / "a"), program, [IMAGE])
    # Every integer is equal. fc is float, and ONNX Runtime adds its 64 products in another order than PyTorch.
    assert parity.max_error_steps == 0.0 and parity.first_difference in (None, "fc") and parity.agreement == 1.0


def test_what_the_article_lists_for_fusion_is_fused() -> None:
    blocks = ("residual_block", "downsample_block")
    pairs = [[f"{block}.conv.{i}", f"{block}.conv.{i + 1}"] for block in blocks for i in (0, 3, 6)]
    plan = eq.plan(edge_model(), IMAGE, fusions=[["entry_block.0", "entry_block.1", "entry_block.2"], *pairs])
    fused = {row.op: row.fused for row in plan.rows() if row.kind == "conv"}
    assert fused["entry_block.0"] == "entry_block.1 + relu"
    assert fused["residual_block.conv.6"] == "residual_block.conv.7"
