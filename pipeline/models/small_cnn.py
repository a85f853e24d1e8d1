"""A small convolutional network for small images."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import nn

from pipeline.contracts.columns import InputSpec
from pipeline.models.params import MODELS, ModelParams

_MIN_POOLED_SIZE = 4  # pixels: a smaller image keeps its size, so that 3x3 filters still see something


def _stage(in_channels: int, out_channels: int, *, pool: bool) -> list[nn.Module]:
    layers: list[nn.Module] = [
        nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
    ]
    return [*layers, nn.MaxPool2d(2)] if pool else layers


@MODELS.register
class SmallCNNParams(ModelParams):
    """Three stages of 3x3 convolution, BatchNorm and ReLU, then a global average and a linear layer."""

    images_only: ClassVar[bool] = True

    name: Literal["small_cnn"] = "small_cnn"
    width: int = Field(default=32, ge=1)
    """Channels of the first stage; the next have twice and four times as many."""

    def build_network(self, spec: InputSpec) -> nn.Module:
        """Takes images of any size; halves them after the first two stages while they have 4 pixels or more."""
        channels, *size = spec.shape
        layers: list[nn.Module] = []
        smallest = min(size)
        for stage in range(3):
            pool = stage < 2 and smallest >= _MIN_POOLED_SIZE
            layers += _stage(channels, self.width << stage, pool=pool)
            channels = self.width << stage
            smallest = smallest // 2 if pool else smallest
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, spec.num_classes))
