"""The CIFAR families against what their papers publish."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from pipeline.contracts.columns import InputSpec
from pipeline.models import MODELS
from pipeline.models.cifar_wrn import WideResNetParams

CIFAR10 = InputSpec("image", (3, 32, 32), tuple(f"class {k}" for k in range(10)))
CIFAR100 = InputSpec("image", (3, 32, 32), tuple(f"class {k}" for k in range(100)))


def count_parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def build(name: str, spec: InputSpec = CIFAR100) -> nn.Sequential:
    network = MODELS.get(name)().build_network(spec)
    assert isinstance(network, nn.Sequential)
    return network


def shapes(network: nn.Sequential) -> list[tuple[int, ...]]:
    """Channels and size after every layer that changes one of them."""
    found: list[tuple[int, ...]] = []
    outputs = torch.zeros(1, 3, 32, 32)
    with torch.inference_mode():
        for layer in network.eval():
            outputs = layer(outputs)
            if not found or found[-1] != outputs.shape[1:]:
                found.append(tuple(outputs.shape[1:]))
    return found


# arXiv 1512.03385, table 6, says 0.27M, 0.46M, 0.85M and 1.7M.
@pytest.mark.parametrize(
    ("name", "num_parameters"),
    [("resnet20", 269_722), ("resnet32", 464_154), ("resnet56", 853_018), ("resnet110", 1_727_962)],
)
def test_cifar_resnets_have_the_published_number_of_parameters(name: str, num_parameters: int) -> None:
    network = build(name, CIFAR10)
    assert count_parameters(network) == num_parameters
    weights = sum(isinstance(module, nn.Conv2d | nn.Linear) for module in network.modules())
    assert weights == int(name.removeprefix("resnet"))


# Of the implementations that the KD papers compare with, for 100 classes (arXiv 1910.10699).
@pytest.mark.parametrize(
    ("name", "num_parameters"),
    [
        ("resnet8x4", 1_233_540),
        ("resnet32x4", 7_433_860),
        ("wrn_16_2", 703_284),
        ("wrn_28_4", 5_872_180),
        ("wrn_40_2", 2_255_156),
        ("vgg8", 3_965_028),
        ("vgg13", 9_462_180),
    ],
)
def test_networks_of_the_kd_papers_have_the_published_number_of_parameters(name: str, num_parameters: int) -> None:
    with torch.device("meta"):
        assert count_parameters(build(name)) == num_parameters


def test_networks_of_the_kd_papers_have_the_published_stages() -> None:
    wide = [(32, 32, 32), (64, 32, 32), (128, 16, 16), (256, 8, 8), (256, 1, 1), (256,), (100,)]
    assert shapes(build("resnet8x4")) == wide
    residual = [(16, 32, 32), (32, 32, 32), (64, 16, 16), (128, 8, 8), (128, 1, 1), (128,), (100,)]
    assert shapes(build("wrn_16_2")) == residual
    vgg = [(64, 32, 32), (64, 16, 16), (128, 16, 16), (128, 8, 8), (256, 8, 8), (256, 4, 4), (512, 4, 4)]
    assert shapes(build("vgg8")) == [*vgg, (512, 1, 1), (512,), (100,)]


def test_the_residual_shortcut_is_the_identity_padded_with_zeros() -> None:
    block = next(module for module in build("resnet20") if getattr(module, "num_padded", 0))
    for parameter in block.parameters():
        nn.init.zeros_(parameter)
    inputs = torch.rand(2, 16, 6, 6)
    outputs = block(inputs)
    assert outputs.shape == (2, 32, 3, 3)
    torch.testing.assert_close(outputs[:, 8:24], inputs[:, :, ::2, ::2])
    assert not outputs[:, :8].any()
    assert not outputs[:, 24:].any()


def test_the_projected_shortcut_is_a_convolution_and_a_norm() -> None:
    block = build("resnet8x4")[4].eval()
    assert block.stride == 2
    nn.init.zeros_(block.bn2.weight)  # nothing but the shortcut is left
    inputs = torch.randn(2, 64, 6, 6)
    convolution, norm = block.projection
    expected = torch.einsum("oi,bihw->bohw", convolution.weight[:, :, 0, 0], inputs[:, :, ::2, ::2])
    torch.testing.assert_close(block(inputs), (expected / (1 + norm.eps) ** 0.5).relu(), rtol=1e-4, atol=1e-5)


def test_a_wide_block_adds_to_its_input_or_to_the_projected_activation() -> None:
    network = build("wrn_16_2").eval()
    first, second = network[1], network[2]
    for block in (first, second):
        nn.init.zeros_(block.conv2.weight)
    inputs = torch.randn(2, 32, 6, 6)
    torch.testing.assert_close(second(inputs), inputs)
    inputs = torch.randn(2, 16, 6, 6)
    activated = (inputs / (1 + first.bn1.eps) ** 0.5).relu()
    expected = torch.einsum("oi,bihw->bohw", first.projection.weight[:, :, 0, 0], activated)
    torch.testing.assert_close(first(inputs), expected, rtol=1e-4, atol=1e-5)


def test_wide_residual_networks_have_any_depth_and_width() -> None:
    with torch.device("meta"):
        # arXiv 1605.07146 has 36.5M for WRN-28-10 and 0.6M for WRN-40-1.
        assert count_parameters(WideResNetParams().build_network(CIFAR10)) == 36_479_194
        narrow = WideResNetParams(depth=40, widen_factor=1)
        assert count_parameters(narrow.build_network(CIFAR10)) == pytest.approx(0.6e6, rel=0.1)
    same, named = WideResNetParams(depth=16, widen_factor=2).build_network(CIFAR100), build("wrn_16_2")
    assert {name: t.shape for name, t in same.state_dict().items()} == {
        name: t.shape for name, t in named.state_dict().items()
    }
    for depth, near in ((17, "16 or 22"), (27, "22 or 28")):
        with pytest.raises(ValidationError, match=f"4 more than a multiple of 6, got {depth}; use {near}"):
            WideResNetParams(depth=depth)
    with pytest.raises(ValidationError, match="widen_factor"):
        WideResNetParams(widen_factor=0)
