from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.ao.nn.quantized import FloatFunctional
from torch.ao.quantization import DeQuantStub, QuantStub

import edgeqat as eq
from edgeqat import zoo
from edgeqat.errors import ModelError
from helpers import EXACT_ARITHMETIC
from models import shake

FACTORIES = [
    zoo.edge_model,
    zoo.edge_model_with_stubs,
    zoo.resnet20,
    zoo.resnet8,
    zoo.mobilenetv2_cifar,
]


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


def test_resnet8_has_the_size_of_the_mlperf_tiny_reference() -> None:
    """Keras counts 78,666, the running statistics of batch norms included."""
    model = zoo.resnet8()
    counted = [value for name, value in model.state_dict().items() if not name.endswith("num_batches_tracked")]
    assert sum(value.numel() for value in counted) == 78_666
    assert sum(p.numel() for p in model.parameters()) == 78_666 - 2 * (16 + 2 * (16 + 32 + 64))


def test_resnet8_shortcuts() -> None:
    """With its last batch norm at zero a block is relu of its shortcut: the input, or a bare strided conv."""
    model = zoo.resnet8().eval()
    x = torch.randn(2, 16, 8, 8)
    for block in (model.block1, model.block2):
        nn.init.zeros_(block.bn2.weight)
    shortcut = model.block2.shortcut
    assert isinstance(shortcut, nn.Conv2d)
    nn.init.ones_(shortcut.bias)
    with torch.no_grad():
        assert torch.equal(model.block1(x), x.relu())
        picked = torch.einsum("oi,nihw->nohw", shortcut.weight[:, :, 0, 0], x[:, :, ::2, ::2]) + 1
        torch.testing.assert_close(model.block2(x), picked.relu())
    assert all(m.bias is not None for m in model.modules() if isinstance(m, nn.Conv2d))


def test_mobilenetv2_has_the_published_layers_and_size() -> None:
    model = zoo.mobilenetv2_cifar()
    assert sum(p.numel() for p in model.parameters()) == 590_410
    assert {name.split(".")[0] for name in model.state_dict()} == {"features", "classifier"}
    assert len(model.features) == 3 + 17 + 3
    convs = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    assert convs["features.0"].weight.shape == (16, 3, 3, 3)
    assert list(convs)[1:3] == ["features.3.conv.0", "features.3.conv.3"]  # expansion 1: depthwise, projection
    assert [name for name, conv in convs.items() if conv.stride == (2, 2)] == [
        f"features.{first}.conv.3"
        for first in (6, 9, 16)  # stages of 32, 64 and 160 channels
    ]
    assert convs["features.20"].weight.shape == (640, 160, 1, 1)
    assert all(conv.bias is None for conv in convs.values())
    with torch.no_grad():
        assert model.features(torch.randn(1, 3, 32, 32)).shape == (1, 640, 4, 4)


@pytest.mark.parametrize(("width", "first", "last"), [(0.1, 8, 128), (0.25, 8, 320), (1.0, 32, 1280), (1.4, 48, 1792)])
def test_mobilenetv2_width_scales_to_multiples_of_8(width: float, first: int, last: int) -> None:
    model = zoo.mobilenetv2_cifar(10, width)
    assert model.features[0].out_channels == first
    assert model.classifier.in_features == last
    assert all(m.out_channels % 8 == 0 for m in model.features.modules() if isinstance(m, nn.Conv2d))


@pytest.mark.parametrize("width", [0.0, -1.0, float("nan"), float("inf")])
def test_mobilenetv2_width_that_is_none(width: float) -> None:
    with pytest.raises(ModelError, match=r"width is .*, wanted a number above 0"):
        zoo.mobilenetv2_cifar(10, width)


@EXACT_ARITHMETIC
@pytest.mark.parametrize("factory", [zoo.resnet8, zoo.mobilenetv2_cifar])
def test_whole_network_in_integers_and_bit_exact(factory: Callable[[], nn.Module], tmp_path: Path) -> None:
    model, batch = shake(factory()).eval(), torch.randn(8, 3, 32, 32)
    planned = eq.plan(model, batch, "onnxruntime")
    assert [op.name for op in planned.program.ops if op.kind == "float"] == []
    program = eq.convert(eq.calibrate(eq.prepare(model, batch), [batch]))
    artifact = eq.lower(program, "onnxruntime", tmp_path / "model")
    parity = eq.verify(artifact, program, [torch.randn(8, 3, 32, 32)])
    assert parity.first_difference is None
    assert (parity.bit_identical, parity.max_error_steps) == (1.0, 0.0)


def test_public_names() -> None:
    assert set(zoo.__all__) >= {
        "EdgeModel",
        "EdgeModelWithStubs",
        "MobileNetV2",
        "edge_model",
        "edge_model_with_stubs",
        "mobilenetv2_cifar",
        "resnet8",
        "resnet20",
    }
    assert all(hasattr(zoo, name) for name in zoo.__all__)
