"""The residual networks for CIFAR of He et al., arXiv 1512.03385, section 4.2, and their wider kin of the KD papers."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.contracts.columns import InputSpec
from pipeline.models.params import MODELS, ModelParams

Fan = Literal["fan_in", "fan_out"]


def init_convolutions(network: nn.Module, fan: Fan) -> None:
    """Normal weights after He et al., arXiv 1502.01852: their variance keeps activations (``fan_in``) or gradients."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode=fan, nonlinearity="relu")


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
        return torch.relu(outputs + self._shortcut(inputs))

    def _shortcut(self, inputs: Tensor) -> Tensor:
        if self.stride == 1 and not self.num_padded:
            return inputs
        before = self.num_padded // 2
        padding = (0, 0, 0, 0, before, self.num_padded - before)
        return F.pad(inputs[:, :, :: self.stride, :: self.stride], padding)


class _ProjectionBlock(_Block):
    """The same with a 1x1 convolution as shortcut where size or channels change (option B)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__(in_channels, out_channels, stride)
        self.projection: nn.Module = nn.Identity()
        if stride > 1 or self.num_padded:
            convolution = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
            self.projection = nn.Sequential(convolution, nn.BatchNorm2d(out_channels))

    def _shortcut(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.projection(inputs)
        return outputs


def pooled_head(width: int, num_classes: int) -> tuple[nn.Module, nn.Module, nn.Linear]:
    """What the networks for CIFAR end in: the mean over the image of ``width`` channels, and a linear layer."""
    return nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes)


class CifarResNetParams(ModelParams):
    """Residual network of ``depth`` layers: three stages of 16, 32 and 64 channels, each half the size of the last.

    Source: arXiv 1512.03385, section 4.2, table 6 (0.27M, 0.46M, 0.85M and 1.7M parameters on CIFAR-10).
    Takes images of any size and number of channels.
    """

    images_only: ClassVar[bool] = True
    depth: ClassVar[int]
    stem: ClassVar[int] = 16  # channels of the first convolution
    channels: ClassVar[tuple[int, ...]] = (16, 32, 64)  # of each stage
    block: ClassVar[type[_Block]] = _Block
    fan: ClassVar[Fan] = "fan_in"

    def build_network(self, spec: InputSpec) -> nn.Module:
        # Two layers a block, three stages; the first and the last layer make the other 2.
        blocks_per_stage = (self.depth - 2) // 6
        width = self.stem
        layers: list[nn.Module] = [
            nn.Conv2d(spec.shape[0], width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        ]
        for stage, channels in enumerate(self.channels):
            for block in range(blocks_per_stage):
                layers.append(self.block(width, channels, stride=2 if stage > 0 and block == 0 else 1))
                width = channels
        network = nn.Sequential(*layers, *pooled_head(width, spec.num_classes))
        init_convolutions(network, self.fan)
        return network


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


class WideCifarResNetParams(CifarResNetParams):
    """The same with four times the channels and with projections: the pairs resnet32x4 -> resnet8x4 of the KD papers.

    Source: Tian et al., arXiv 1910.10699 (7.43M and 1.23M parameters on CIFAR-100).
    """

    stem: ClassVar[int] = 32  # twice the 16 of the others, not four times, as published
    channels: ClassVar[tuple[int, ...]] = (64, 128, 256)
    block: ClassVar[type[_Block]] = _ProjectionBlock
    fan: ClassVar[Fan] = "fan_out"


@MODELS.register
class ResNet8x4Params(WideCifarResNetParams):
    """8 layers."""

    name: Literal["resnet8x4"] = "resnet8x4"
    depth: ClassVar[int] = 8


@MODELS.register
class ResNet32x4Params(WideCifarResNetParams):
    """32 layers."""

    name: Literal["resnet32x4"] = "resnet32x4"
    depth: ClassVar[int] = 32
