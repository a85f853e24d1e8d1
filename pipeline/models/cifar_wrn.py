"""Wide residual networks for CIFAR of Zagoruyko and Komodakis, arXiv 1605.07146."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from pipeline.contracts.columns import InputSpec
from pipeline.models.cifar_resnet import init_convolutions, pooled_head
from pipeline.models.params import MODELS, ModelParams

_STEM_CHANNELS = 16
_LAYERS_PER_BLOCK = 6  # two convolutions in each of three stages


class _Block(nn.Module):
    """BatchNorm and ReLU before each of two 3x3 convolutions.

    The shortcut is the input itself or, where channels change, a 1x1 convolution of its activation.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.projection: nn.Conv2d | None = None
        if stride > 1 or in_channels != out_channels:
            self.projection = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        activated = torch.relu(self.bn1(inputs))
        outputs = self.conv2(torch.relu(self.bn2(self.conv1(activated))))
        shortcut = inputs if self.projection is None else self.projection(activated)
        result: Tensor = outputs + shortcut
        return result


def _build(depth: int, widen_factor: int, spec: InputSpec) -> nn.Module:
    channels = _STEM_CHANNELS
    layers: list[nn.Module] = [nn.Conv2d(spec.shape[0], channels, 3, padding=1, bias=False)]
    for stage in range(3):
        width = (_STEM_CHANNELS << stage) * widen_factor
        for block in range((depth - 4) // _LAYERS_PER_BLOCK):
            layers.append(_Block(channels, width, stride=2 if stage > 0 and block == 0 else 1))
            channels = width
    head = pooled_head(channels, spec.num_classes)
    nn.init.zeros_(head[-1].bias)
    network = nn.Sequential(*layers, nn.BatchNorm2d(channels), nn.ReLU(), *head)
    init_convolutions(network, "fan_out")
    return network


@MODELS.register
class WideResNetParams(ModelParams):
    """Wide residual network of any depth and width: three stages, each half the size of the last; no dropout.

    Source: arXiv 1605.07146 (WRN-28-10 has 36.5M parameters). Takes images of any size and number of channels.
    """

    name: Literal["wrn"] = "wrn"
    images_only: ClassVar[bool] = True
    depth: int = Field(default=28, ge=10)
    """Layers: 4 more than a multiple of 6."""
    widen_factor: int = Field(default=10, ge=1)
    """The stages have 16, 32 and 64 channels times this."""

    @model_validator(mode="after")
    def _check_depth(self) -> Self:
        if (self.depth - 4) % _LAYERS_PER_BLOCK:
            below = self.depth - (self.depth - 4) % _LAYERS_PER_BLOCK
            near = f"{below} or {below + _LAYERS_PER_BLOCK}"
            raise ValueError(f"depth must be 4 more than a multiple of 6, got {self.depth}; use {near}")
        return self

    def build_network(self, spec: InputSpec) -> nn.Module:
        return _build(self.depth, self.widen_factor, spec)


class PublishedWideResNetParams(ModelParams):
    """One of the wide residual networks that the KD papers compare on (arXiv 1910.10699)."""

    images_only: ClassVar[bool] = True
    depth: ClassVar[int]
    widen_factor: ClassVar[int]

    def build_network(self, spec: InputSpec) -> nn.Module:
        return _build(self.depth, self.widen_factor, spec)


@MODELS.register
class WRN16x2Params(PublishedWideResNetParams):
    """16 layers, twice as wide."""

    name: Literal["wrn_16_2"] = "wrn_16_2"
    depth: ClassVar[int] = 16
    widen_factor: ClassVar[int] = 2


@MODELS.register
class WRN28x4Params(PublishedWideResNetParams):
    """28 layers, four times as wide."""

    name: Literal["wrn_28_4"] = "wrn_28_4"
    depth: ClassVar[int] = 28
    widen_factor: ClassVar[int] = 4


@MODELS.register
class WRN40x2Params(PublishedWideResNetParams):
    """40 layers, twice as wide."""

    name: Literal["wrn_40_2"] = "wrn_40_2"
    depth: ClassVar[int] = 40
    widen_factor: ClassVar[int] = 2
