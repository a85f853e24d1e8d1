"""Networks, and the classifier around them."""

from __future__ import annotations

import itertools
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from torch import Tensor, nn

from pipeline.contracts.columns import InputSpec
from pipeline.errors import ConfigError, ModelError
from pipeline.models import MODELS, ModelParams, build_classifier
from pipeline.models.custom import CustomParams
from pipeline.models.mlp import MLPParams
from pipeline.models.small_cnn import SmallCNNParams
from pipeline.models.torchvision_zoo import TorchvisionParams

TEN = tuple(f"class {k}" for k in range(10))
DIGITS = InputSpec("image", (1, 8, 8), TEN)
CIFAR = InputSpec("image", (3, 32, 32), TEN)
FEATURES = InputSpec("features", (5,), ("no", "yes", "maybe"))

CNN = SmallCNNParams(width=4)


def count_parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def images(spec: InputSpec, rows: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (rows, *spec.shape), dtype=np.uint8)


# --- networks ---------------------------------------------------------------------------------------------------


def test_small_networks_have_the_parameters_of_their_formula() -> None:
    def expected(channels: int, width: int) -> int:
        widths = [channels, width, 2 * width, 4 * width]
        stages = sum(9 * i * o + 2 * o for i, o in itertools.pairwise(widths))
        return stages + 4 * width * 10 + 10

    assert count_parameters(SmallCNNParams().build_network(DIGITS)) == expected(1, 32)
    assert count_parameters(SmallCNNParams(width=8).build_network(CIFAR)) == expected(3, 8)
    mlp = MLPParams(hidden=(7, 6)).build_network(DIGITS)
    assert count_parameters(mlp) == (64 * 7 + 7) + (7 * 6 + 6) + (6 * 10 + 10)
    assert count_parameters(MLPParams(hidden=()).build_network(FEATURES)) == 5 * 3 + 3


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (2, 1, 5), (4, 17, 3)])
@pytest.mark.parametrize("name", ["small_cnn", "mlp", "resnet20", "resnet8x4", "wrn_16_2", "vgg8"])
def test_image_networks_take_any_size_and_train(name: str, shape: tuple[int, int, int]) -> None:
    classifier = build_classifier(MODELS.get(name)(), InputSpec("image", shape, ("a", "b", "c")))
    assert classifier.training
    logits = classifier(torch.from_numpy(images(classifier.spec, 4)))
    logits.logsumexp(1).sum().backward()
    assert logits.shape == (4, 3)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in classifier.parameters())
    assert logits.std() > 0, "a head of zeros has no gradient worth the name"


def test_torchvision_networks_are_built_by_name() -> None:
    classifier = build_classifier(TorchvisionParams(arch="squeezenet1_1"), CIFAR)
    assert type(classifier.network).__name__ == "SqueezeNet"
    with pytest.raises(ConfigError, match=r"no classification network 'resnet19': did you mean 'resnet1[08]'\?"):
        build_classifier(TorchvisionParams(arch="resnet19"), CIFAR)
    with pytest.raises(ConfigError, match="no classification network 'fcn_resnet50'"):
        build_classifier(TorchvisionParams(arch="fcn_resnet50"), CIFAR)
    with pytest.raises(ModelError, match="takes images of 3 channels but the data has 1 channels"):
        build_classifier(TorchvisionParams(arch="resnet18"), DIGITS)
    with pytest.raises(ModelError, match="but the data has features"):
        build_classifier(TorchvisionParams(arch="resnet18"), FEATURES)


def test_a_network_may_come_from_the_users_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_network.py").write_text(
        "from torch import nn\n"
        "constant = 3\n"
        "def build(spec, width):\n"
        "    return nn.Sequential(nn.Linear(spec.shape[0], width), nn.Linear(width, spec.num_classes))\n"
        "def fails(spec): raise RuntimeError('no luck')\n"
        "def wrong(spec): return 'network'\n"
        "def narrow(spec): return nn.Linear(spec.shape[0], 1)\n"
        "def pair(spec): return nn.LSTM(spec.shape[0], spec.num_classes)\n"
        "def large(spec): return nn.Linear(99, spec.num_classes)\n"
    )
    (tmp_path / "own_broken.py").write_text("import there_is_no_such_module\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", os.getcwd())])

    network = build_classifier(CustomParams(factory="own_network:build", kwargs={"width": 7}), FEATURES).network
    assert count_parameters(network) == 5 * 7 + 7 + 7 * 3 + 3
    for factory, message in {
        "own_networks:build": r"module 'own_networks' cannot be imported from .*No module named 'own_networks'",
        "own_broken:build": r"module 'own_broken' cannot be imported .*No module named 'there_is_no_such_module'",
        "own_network:bild": r"own_network\.py has no 'bild'",
        "own_network:constant": r"has something that cannot be called under 'constant'",
        "own_network:fails": r"called with \(spec\) raised RuntimeError: no luck",
        "own_network:build": r"missing 1 required positional argument: 'width'",
        "own_network:wrong": r"is a str, expected a torch.nn.Module",
        "own_network:narrow": r"returns shape \(2, 1\) for a batch of two rows, expected \(2, 3\)",
        "own_network:pair": r"returns a tuple, expected the logits alone",
        "own_network:large": r"fails on a batch of two rows: RuntimeError: ",
    }.items():
        with pytest.raises(ModelError, match=message) as caught:
            build_classifier(CustomParams(factory=factory), FEATURES)
        assert "\n" not in caught.value.message
    with pytest.raises(ValidationError, match="factory"):
        CustomParams(factory="own_network")


@pytest.mark.parametrize("name", MODELS.names())
def test_every_model_describes_its_architecture_as_json(name: str) -> None:
    required = {
        "torchvision": {"arch": "resnet18"},
        "timm": {"arch": "resnet18"},
        "custom": {"factory": "module:function"},
    }
    params = MODELS.get(name)(checkpoint="runs/x", mean=(0.5,), image_size=(4, 4), **required.get(name, {}))
    architecture = params.architecture()
    assert architecture == json.loads(json.dumps(architecture))
    assert architecture["name"] == name
    assert not {"checkpoint", "weights", "pretrained", "mean", "std", "image_size", "pool"} & architecture.keys()


# --- classifier -------------------------------------------------------------------------------------------------


class Spy(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        self.seen = inputs
        return inputs.new_zeros(len(inputs), 10)


class SpyParams(ModelParams):
    name: str = "spy"

    def build_network(self, spec: InputSpec) -> nn.Module:
        return Spy()


def seen(params: ModelParams, spec: InputSpec, inputs: Tensor) -> Tensor:
    """What the network gets of ``inputs``."""
    classifier = build_classifier(params, spec)
    classifier(inputs)
    assert isinstance(classifier.network, Spy)
    return classifier.network.seen


def test_pixels_are_scaled_and_normalised() -> None:
    white = torch.full((1, 3, 1, 1), 255, dtype=torch.uint8)
    colour, grey = InputSpec("image", (3, 1, 1), TEN), InputSpec("image", (1, 1, 1), TEN)
    imagenet = [(1 - m) / s for m, s in ((0.485, 0.229), (0.456, 0.224), (0.406, 0.225))]
    assert seen(SpyParams(), colour, white).flatten().tolist() == pytest.approx(imagenet)
    assert seen(SpyParams(mean=(0, 0, 1), std=(1, 2, 1)), colour, white).flatten().tolist() == [1, 0.5, 0]
    assert seen(SpyParams(), grey, white[:, :1]).item() == 1.0
    assert seen(SpyParams(), grey, 0 * white[:, :1]).item() == -1.0

    vectors, values = InputSpec("features", (2,), TEN), torch.tensor([[10.0, 20.0]])
    assert seen(SpyParams(), vectors, values).tolist() == [[10, 20]]
    assert seen(SpyParams(mean=(10, 10)), vectors, values).tolist() == [[0, 10]]
    assert seen(SpyParams(std=(2, 4)), vectors, values).tolist() == [[5, 5]]


def test_normalisation_is_no_part_of_the_weights() -> None:
    classifier = build_classifier(CNN, DIGITS)
    assert {name.removeprefix("network.") for name in classifier.state_dict()} == set(classifier.network.state_dict())


def test_wrong_normalisation_and_scaled_pixels_are_refused() -> None:
    with pytest.raises(ConfigError, match="mean of 'small_cnn' has 3 values but the data has 1 channels"):
        build_classifier(SmallCNNParams(mean=(0.5, 0.5, 0.5)), DIGITS)
    with pytest.raises(ConfigError, match="std of 'mlp' has 2 values but the data has 5 features"):
        build_classifier(MLPParams(std=(1, 1)), FEATURES)
    with pytest.raises(ValidationError, match="std must be above 0"):
        SmallCNNParams(std=(0.0,))
    with pytest.raises(ModelError, match=r"got torch.float32 pixels but takes uint8"):
        build_classifier(CNN, DIGITS)(torch.zeros(2, *DIGITS.shape))


@pytest.mark.parametrize("size", [(16, 24), (48, 64), (7, 50)])
def test_images_are_resized_to_what_the_network_takes_before_they_are_normalised(size: tuple[int, int]) -> None:
    pixels = images(CIFAR, 2)
    params = SpyParams(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), image_size=size)
    resized = 255 * (0.5 + 0.25 * seen(params, CIFAR, torch.from_numpy(pixels)))
    for row, channel in itertools.product(range(2), range(3)):
        plane = Image.fromarray(pixels[row, channel].astype(np.float32))
        expected = plane.resize(size[::-1], Image.Resampling.BILINEAR)
        np.testing.assert_allclose(resized[row, channel], np.asarray(expected), atol=1e-3)


def test_a_network_is_built_for_the_size_it_takes() -> None:
    params = MLPParams(hidden=(), image_size=(4, 6))
    assert count_parameters(build_classifier(params, DIGITS).network) == 4 * 6 * 10 + 10
    assert build_classifier(params, DIGITS).spec == DIGITS
    with pytest.raises(ModelError, match=r"model 'vgg8' takes images but the data has features"):
        build_classifier(MODELS.get("vgg8")(), FEATURES)
    with pytest.raises(ConfigError, match=r"image_size of 'mlp' is \[4, 6\] but the data has features"):
        build_classifier(params, FEATURES)
    for wrong in ((0, 4), (4,), (4, 4, 3)):
        with pytest.raises(ValidationError, match="image_size"):
            MLPParams(image_size=wrong)


def test_the_size_of_the_data_is_no_resizing() -> None:
    pixels = torch.from_numpy(images(DIGITS, 2))
    assert build_classifier(SpyParams(image_size=(8, 8)), DIGITS).image_size is None
    torch.testing.assert_close(
        seen(SpyParams(image_size=(8, 8)), DIGITS, pixels), seen(SpyParams(), DIGITS, pixels), rtol=0, atol=0
    )


def test_a_network_that_cannot_take_the_images_says_what_to_do() -> None:
    with pytest.raises(ModelError, match=r"fails on a batch of two rows: .* or give image_size=\[HEIGHT,WIDTH\]"):
        build_classifier(TorchvisionParams(arch="squeezenet1_1"), InputSpec("image", (3, 4, 4), TEN))
