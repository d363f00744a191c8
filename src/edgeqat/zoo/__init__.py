"""Models to start from; each factory is usable as `model.factory` in a recipe."""

from edgeqat.zoo.edge import EdgeModel, EdgeModelWithStubs, edge_model, edge_model_with_stubs
from edgeqat.zoo.mobilenet import MobileNetV2, mobilenetv2_cifar
from edgeqat.zoo.mobilenet_imagenet import MobileNetV2ImageNet, mobilenetv2_imagenet
from edgeqat.zoo.resnet import ResNet8, ResNetCifar, resnet8, resnet20

__all__ = [
    "EdgeModel",
    "EdgeModelWithStubs",
    "MobileNetV2",
    "MobileNetV2ImageNet",
    "ResNet8",
    "ResNetCifar",
    "edge_model",
    "edge_model_with_stubs",
    "mobilenetv2_cifar",
    "mobilenetv2_imagenet",
    "resnet8",
    "resnet20",
]
