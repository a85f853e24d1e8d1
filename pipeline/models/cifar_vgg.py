"""The VGG networks of the KD papers: with BatchNorm, and one linear layer after the convolutions.

Their names count the three linear layers of the original.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import nn

from pipeline.contracts.columns import InputSpec
from pipeline.models.cifar_resnet import init_convolutions, pooled_head
from pipeline.models.params import MODELS, ModelParams

_STAGE_CHANNELS = (64, 128, 256, 512, 512)
_MIN_POOLED_SIZE = 8  # pixels: 32 x 32 is halved three times and 64 x 64 four times, as published


class CifarVGGParams(ModelParams):
    """Five stages of 3x3 convolutions, BatchNorm and ReLU, a global average and a linear layer.

    The first four stages end with max pooling while the image has 8 pixels or more, so the last two see 4 x 4 of
    CIFAR's 32 x 32. Takes images of any size and number of channels.
    Source: Simonyan and Zisserman, arXiv 1409.1556, in the form of Tian et al., arXiv 1910.10699.
    """

    images_only: ClassVar[bool] = True
    convolutions_per_stage: ClassVar[int]

    def build_network(self, spec: InputSpec) -> nn.Module:
        channels, *size = spec.shape
        smallest = min(size)
        layers: list[nn.Module] = []
        for stage, width in enumerate(_STAGE_CHANNELS):
            for _ in range(self.convolutions_per_stage):
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
                channels = width
            if stage < len(_STAGE_CHANNELS) - 1 and smallest >= _MIN_POOLED_SIZE:
                layers.append(nn.MaxPool2d(2))
                smallest //= 2
        head = pooled_head(channels, spec.num_classes)
        network = nn.Sequential(*layers, *head)
        init_convolutions(network, "fan_out")
        for module in network.modules():
            if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        nn.init.normal_(head[-1].weight, std=0.01)
        return network


@MODELS.register
class VGG8Params(CifarVGGParams):
    """One convolution a stage."""

    name: Literal["vgg8"] = "vgg8"
    convolutions_per_stage: ClassVar[int] = 1


@MODELS.register
class VGG13Params(CifarVGGParams):
    """Two convolutions a stage."""

    name: Literal["vgg13"] = "vgg13"
    convolutions_per_stage: ClassVar[int] = 2
