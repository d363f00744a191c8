from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.ao.nn.quantized import FloatFunctional
from torch.ao.quantization import DeQuantStub, QuantStub

from edgeqat import zoo
from edgeqat.errors import ModelError

FACTORIES = [zoo.edge_model, zoo.edge_model_with_stubs, zoo.resnet20]


@pytest.mark.parametrize("factory", FACTORIES)
def test_factories_build_a_classifier(factory: Callable[[int], nn.Module]) -> None:
    assert inspect.signature(factory).parameters["num_classes"].default == 10
    model = factory(7).eval()
    with torch.no_grad():
        assert model(torch.randn(2, 3, 32, 32)).shape == (2, 7)
    with pytest.raises(ModelError, match="num_classes is 0, wanted at least 1"):
        factory(0)


def test_edge_models_share_a_state_dict_and_a_function() -> None:
    plain, stubbed = zoo.edge_model().eval(), zoo.edge_model_with_stubs().eval()
    assert list(plain.state_dict()) == list(stubbed.state_dict())
    stubbed.load_state_dict(plain.state_dict(), strict=True)
    x = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(plain(x), stubbed(x))
    plain.load_state_dict(zoo.edge_model_with_stubs().state_dict(), strict=True)


def test_edge_model_has_the_articles_modules() -> None:
    names = ["entry_block", "residual_block", "downsample_block", "avgpool", "fc"]
    assert [name for name, _ in zoo.edge_model().named_children()] == names
    stubbed = zoo.edge_model_with_stubs()
    assert [name for name, _ in stubbed.named_children()] == ["quant", *names, "dequant"]
    assert isinstance(stubbed.quant, QuantStub)
    assert isinstance(stubbed.dequant, DeQuantStub)
    assert isinstance(stubbed.residual_block.skip_add, FloatFunctional)
    entry = 3 * 32 * 9 + 2 * 32
    residual = 32 * 64 + 64 * 9 + 64 * 32 + 2 * (64 + 64 + 32)
    downsample = 32 * 64 + 64 * 9 + 64 * 64 + 2 * (64 + 64 + 64)
    assert sum(p.numel() for p in stubbed.parameters()) == entry + residual + downsample + 64 * 10 + 10


def test_edge_model_adds_only_where_shapes_allow() -> None:
    model = zoo.edge_model().eval()
    x = torch.randn(2, 32, 8, 8)
    with torch.no_grad():
        assert torch.equal(model.residual_block(x), x + model.residual_block.conv(x))
        assert torch.equal(model.downsample_block(x), model.downsample_block.conv(x))
        assert model.downsample_block(x).shape == (2, 64, 4, 4)


def test_resnet20_has_the_published_names_and_size() -> None:
    expected = {"linear.weight", "linear.bias"}
    convs = ["conv1"] + [f"layer{s}.{b}.conv{c}" for s in (1, 2, 3) for b in (0, 1, 2) for c in (1, 2)]
    for conv in convs:
        norm = conv.replace("conv", "bn")
        expected |= {f"{conv}.weight"}
        expected |= {
            f"{norm}.{leaf}" for leaf in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
        }
    model = zoo.resnet20()
    assert set(model.state_dict()) == expected
    assert sum(p.numel() for p in model.parameters()) == 269_722


def test_resnet20_shortcut_is_option_a() -> None:
    """With its convs at zero a block is relu of its shortcut."""
    block = zoo.resnet20().layer2[0].eval()
    nn.init.zeros_(block.conv1.weight)
    nn.init.zeros_(block.conv2.weight)
    x = torch.rand(2, 16, 8, 8)
    with torch.no_grad():
        y = block(x)
    assert y.shape == (2, 32, 4, 4)
    assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2])
    assert not y[:, :8].any()
    assert not y[:, 24:].any()


def test_resnet20_initialises_with_kaiming_normal() -> None:
    torch.manual_seed(0)
    weight = zoo.resnet20().layer3[2].conv2.weight  # 36,864 draws: their std is within 2% of the law's
    assert weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.02)


def test_public_names() -> None:
    assert set(zoo.__all__) >= {
        "EdgeModel",
        "EdgeModelWithStubs",
        "edge_model",
        "edge_model_with_stubs",
        "resnet20",
    }
    assert all(hasattr(zoo, name) for name in zoo.__all__)
