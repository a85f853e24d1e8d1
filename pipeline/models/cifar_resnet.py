"""The residual networks for CIFAR of He et al., arXiv 1512.03385, section 4.2."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.contracts.columns import InputSpec
from pipeline.models.params import MODELS, ModelParams

_STAGE_CHANNELS = (16, 32, 64)


class _Block(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters (option A: subsample, pad channels with zeros)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.stride = stride
        self.num_padded = out_channels - in_channels

    def forward(self, inputs: Tensor) -> Tensor:
        outputs = torch.relu(self.bn1(self.conv1(inputs)))
        outputs = self.bn2(self.conv2(outputs))
        shortcut = inputs
        if self.stride > 1 or self.num_padded:
            shortcut = shortcut[:, :, :: self.stride, :: self.stride]
            before = self.num_padded // 2
            shortcut = F.pad(shortcut, (0, 0, 0, 0, before, self.num_padded - before))
        return torch.relu(outputs + shortcut)


def _build(depth: int, num_channels: int, num_classes: int) -> nn.Module:
    blocks_per_stage = (depth - 2) // 6  # two layers a block, three stages; the first and last layer make the other 2
    width = _STAGE_CHANNELS[0]
    layers: list[nn.Module] = [
        nn.Conv2d(num_channels, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
    ]
    for stage, channels in enumerate(_STAGE_CHANNELS):
        for block in range(blocks_per_stage):
            layers.append(_Block(width, channels, stride=2 if stage > 0 and block == 0 else 1))
            width = channels
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes))
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")  # arXiv 1502.01852, as the paper has it
    return network


class CifarResNetParams(ModelParams):
    """Residual network of ``depth`` layers: three stages of 16, 32 and 64 channels, each half the size of the last.

    Source: arXiv 1512.03385, section 4.2, table 6 (0.27M, 0.46M, 0.85M and 1.7M parameters on CIFAR-10).
    Takes images of any size and number of channels.
    """

    depth: ClassVar[int]

    def build_network(self, spec: InputSpec) -> nn.Module:
        return _build(self.depth, spec.shape[0], spec.num_classes)


@MODELS.register
class ResNet20Params(CifarResNetParams):
    """20 layers."""

    name: Literal["resnet20"] = "resnet20"
    depth: ClassVar[int] = 20


@MODELS.register
class ResNet32Params(CifarResNetParams):
    """32 layers."""

    name: Literal["resnet32"] = "resnet32"
    depth: ClassVar[int] = 32


@MODELS.register
class ResNet56Params(CifarResNetParams):
    """56 layers."""

    name: Literal["resnet56"] = "resnet56"
    depth: ClassVar[int] = 56


@MODELS.register
class ResNet110Params(CifarResNetParams):
    """110 layers."""

    name: Literal["resnet110"] = "resnet110"
    depth: ClassVar[int] = 110
