"""The table of architectures that people deploy: one or two blocks of each.

Real are the kinds of layers, their order, activations, expansions and squeeze ratios; small are channels and images.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn

from architectures import classifiers, mixers, predictors

__all__ = ["BLOCKS", "Block"]


@dataclass(frozen=True)
class Block:
    """A model and how it is called.

    Attributes:
        factory: Makes it.
        shapes: Of each input, without the batch.
        conv_net: Whether every op of it has an integer form.
    """

    factory: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...] = ((3, 32, 32),)
    conv_net: bool = True


SMALL = ((3, 16, 16),)

BLOCKS: Mapping[str, Block] = {
    "mobilenet_v2": Block(classifiers.mobilenet_v2),
    "mobilenet_v3": Block(classifiers.mobilenet_v3),
    "efficientnet": Block(classifiers.efficientnet),
    "shufflenet_v2": Block(classifiers.shufflenet_v2),
    "densenet": Block(classifiers.DenseNet, SMALL),
    "inception": Block(classifiers.inception, SMALL),
    "squeezenet": Block(classifiers.SqueezeNet),
    "regnet_x": Block(classifiers.regnet_x),
    "regnet_y": Block(classifiers.regnet_y),
    "repvgg": Block(classifiers.repvgg),
    "ghostnet": Block(classifiers.ghostnet),
    "unet": Block(predictors.UNet, SMALL),
    "fpn": Block(predictors.FeaturePyramid),
    "yolo_c2f": Block(predictors.yolo),
    "keyword_ds_cnn": Block(classifiers.KeywordSpotter, ((10, 32),)),
    "autoencoder": Block(predictors.Autoencoder, ((64,),)),
    # Their norms and softmax are float by design.
    "convnext": Block(mixers.ConvNeXt, conv_net=False),
    "vit": Block(mixers.VisionTransformer, SMALL, conv_net=False),
    "swin": Block(mixers.Swin, SMALL, conv_net=False),
    "mlp_mixer": Block(mixers.MLPMixer, SMALL, conv_net=False),
}
"""By name."""
