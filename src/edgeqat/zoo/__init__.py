"""Models to start from; each factory is usable as `model.factory` in a recipe."""

from edgeqat.zoo.edge import EdgeModel, EdgeModelWithStubs, edge_model, edge_model_with_stubs
from edgeqat.zoo.resnet import ResNetCifar, resnet20

__all__ = [
    "EdgeModel",
    "EdgeModelWithStubs",
    "ResNetCifar",
    "edge_model",
    "edge_model_with_stubs",
    "resnet20",
]
