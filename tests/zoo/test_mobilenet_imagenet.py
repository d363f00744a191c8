"""The MobileNetV2 whose parameters are those of torchvision's, name for name."""

from __future__ import annotations

import pytest
import torch

from edgeqat.errors import ModelError
from edgeqat.zoo import mobilenetv2_imagenet


def test_parameters_have_torchvisions_names_and_shapes() -> None:
    model = mobilenetv2_imagenet()
    assert sum(parameter.numel() for parameter in model.parameters()) == 3_504_872
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert len(shapes) == 314
    for name, shape in {
        "features.0.0.weight": (32, 3, 3, 3),
        "features.1.conv.0.0.weight": (32, 1, 3, 3),
        "features.1.conv.1.weight": (16, 32, 1, 1),
        "features.1.conv.2.running_mean": (16,),
        "features.2.conv.0.0.weight": (96, 16, 1, 1),
        "features.2.conv.1.1.weight": (96,),
        "features.17.conv.2.weight": (320, 960, 1, 1),
        "features.18.1.num_batches_tracked": (),
        "classifier.1.weight": (1000, 1280),
    }.items():
        assert shapes[name] == shape


@pytest.mark.parametrize("width", [0.25, 0.35, 1.0, 1.4])
def test_images_become_logits(width: float) -> None:
    model = mobilenetv2_imagenet(5, width).eval()
    with torch.no_grad():
        assert model(torch.randn(2, 3, 224, 224)).shape == (2, 5)
        assert model.features(torch.randn(1, 3, 224, 224)).shape[2:] == (7, 7)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [({"num_classes": 0}, "num_classes is 0"), ({"width": 0.0}, "width is 0.0"), ({"dropout": 1.0}, "dropout is 1.0")],
)
def test_arguments_out_of_range(arguments: dict[str, float], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        mobilenetv2_imagenet(**arguments)  # type: ignore[arg-type]
