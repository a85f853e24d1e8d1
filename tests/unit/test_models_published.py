"""Weights that torchvision and timm publish: loaded from torch's cache or from a stand-in, never downloaded."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision.models as zoo
from torch import Tensor, nn

from pipeline.config.compose import compose
from pipeline.config.validate import build_config
from pipeline.contracts.columns import InputSpec
from pipeline.errors import CheckpointError, ConfigError, ModelError
from pipeline.models import (
    Classifier,
    ModelCard,
    ModelParams,
    Teacher,
    build_classifier,
    describe_preprocessing,
    fingerprint_state,
    load_initial_weights,
    save_model,
)
from pipeline.models.timm_zoo import TimmParams
from pipeline.models.torchvision_zoo import TorchvisionParams

TEN = tuple(f"class {k}" for k in range(10))
CIFAR = InputSpec("image", (3, 32, 32), TEN)
IMAGENET = InputSpec("image", (3, 32, 32), tuple(f"class {k}" for k in range(1000)))
GREY = InputSpec("image", (1, 32, 32), TEN)

ARCH = "shufflenet_v2_x0_5"
IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Torch's cache of downloads, empty, on a machine without a network."""

    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise URLError("Temporary failure in name resolution")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def publish(cache: Path, arch: str, **arguments: Any) -> nn.Module:
    """A network of random weights whose file lies where torch keeps what it downloaded."""
    network: nn.Module = zoo.get_model(arch, weights=None, **arguments)
    torch.save(network.state_dict(), cache / os.path.basename(zoo.get_model_weights(arch).DEFAULT.url))
    return network


def start(params: ModelParams, spec: InputSpec = CIFAR) -> tuple[Classifier, str]:
    torch.manual_seed(5)
    classifier = build_classifier(params, spec)
    return classifier, load_initial_weights(classifier, params, role="student")


# --- torchvision --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["DEFAULT", "IMAGENET1K_V1"])
def test_all_but_the_last_layer_is_published_where_the_classes_are_others(cache: Path, weights: str) -> None:
    published = publish(cache, ARCH).state_dict()
    params = TorchvisionParams(arch=ARCH, weights=weights)
    classifier, said = start(params)
    assert said == "IMAGENET1K_V1 of torchvision, last layer fresh"
    own = classifier.network.state_dict()
    assert {name for name in own if own[name].shape != published[name].shape} == {"fc.weight", "fc.bias"}
    assert all(torch.equal(own[name], published[name]) for name in own if not name.startswith("fc."))
    assert own["fc.weight"].std() > 0
    again, _ = start(params)  # another worker
    assert fingerprint_state(again.network.state_dict()) == fingerprint_state(own)


def test_every_layer_is_published_where_the_classes_are_as_many(cache: Path) -> None:
    published = publish(cache, ARCH)
    classifier, said = start(TorchvisionParams(arch=ARCH, weights="DEFAULT"), IMAGENET)
    assert said == "IMAGENET1K_V1 of torchvision"
    assert fingerprint_state(classifier.network.state_dict()) == fingerprint_state(published.state_dict())


def test_weights_that_are_not_asked_for_are_not_loaded(tmp_path: Path) -> None:
    assert start(TorchvisionParams(arch=ARCH))[1] == "fresh weights"
    params = TorchvisionParams(arch=ARCH, weights="DEFAULT")
    trained = build_classifier(params, CIFAR)
    card = ModelCard.describe(params, trained, {}, "data")
    assert card.params == {"name": "torchvision", "arch": ARCH}  # so that nobody who loads it downloads anything
    save_model(tmp_path / "model", trained, card)
    for weights in ("DEFAULT", None):
        classifier, said = start(TorchvisionParams(arch=ARCH, weights=weights, checkpoint=str(tmp_path / "model")))
        assert said == str(tmp_path / "model")
        assert fingerprint_state(classifier.network.state_dict()) == card.fingerprint


def test_unknown_weights_name_the_nearest() -> None:
    for arch, weights, nearest in (
        (ARCH, "IMAGENET1K_V3", "IMAGENET1K_V1"),
        ("resnet50", "IMAGENET_V2", "IMAGENET1K_V2"),
        ("mobilenet_v3_large", "DEFALT", "DEFAULT"),
    ):
        with pytest.raises(ConfigError, match=f"no weights {weights!r} for {arch!r}: did you mean '{nearest}'"):
            build_classifier(TorchvisionParams(arch=arch, weights=weights), CIFAR)
    with pytest.raises(ConfigError, match=r"no weights 'x' for 'resnet50': known are IMAGENET1K_V1, IMAGENET1K_V2"):
        build_classifier(TorchvisionParams(arch="resnet50", weights="x"), CIFAR)
    # Its first weights are for features of images, not for classes.
    with pytest.raises(ConfigError, match=r"no weights 'IMAGENET1K_FEATURES' for 'vgg16'"):
        build_classifier(TorchvisionParams(arch="vgg16", weights="IMAGENET1K_FEATURES"), CIFAR)
    with pytest.raises(ConfigError, match=r"no classification network 'resnet5000'"):
        describe_preprocessing(TorchvisionParams(arch="resnet5000", weights="DEFAULT"), CIFAR)


def test_weights_out_of_reach_say_where_they_may_be_put(cache: Path) -> None:
    with pytest.raises(CheckpointError, match=r"URLError: .*Temporary failure in name resolution") as caught:
        start(TorchvisionParams(arch=ARCH, weights="DEFAULT"))
    url = zoo.get_model_weights(ARCH).DEFAULT.url
    message = caught.value.message
    assert f"cannot be loaded from {url} (" in message
    assert message.endswith(
        f"let this machine reach download.pytorch.org, or put the file at {cache}/{Path(url).name}."
    )
    assert "\n" not in message


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_a_cached_file_that_is_no_weights_is_refused_and_runs_no_code(cache: Path, tmp_path: Path) -> None:
    file = cache / os.path.basename(zoo.get_model_weights(ARCH).DEFAULT.url)
    params = TorchvisionParams(arch=ARCH, weights="DEFAULT")
    torch.save({"fc.weight": Bomb(tmp_path / "boom")}, file)
    with pytest.raises(CheckpointError, match=f"or put the file at {file}"):
        start(params)
    assert not (tmp_path / "boom").exists()
    torch.save({"fc.weight": torch.zeros(3)}, file)
    with pytest.raises(CheckpointError, match=r"RuntimeError: Error"):
        start(params)


def test_published_weights_bring_their_normalisation() -> None:
    expected = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD, "image_size": None}
    assert describe_preprocessing(TorchvisionParams(arch=ARCH, weights="DEFAULT"), CIFAR) == expected
    given = TorchvisionParams(arch=ARCH, weights="DEFAULT", mean=(0.1, 0.2, 0.3), image_size=(64, 64))
    changed = {"mean": [0.1, 0.2, 0.3], "image_size": [64, 64]}
    assert describe_preprocessing(given, CIFAR) == expected | changed


def test_googlenet_sees_what_torchvision_shows_it(cache: Path) -> None:
    """Torchvision has its published weights take pixels normalised in ImageNet's way, and converts them inside."""
    publish(cache, "googlenet", init_weights=False)
    classifier, _ = start(TorchvisionParams(arch="googlenet", weights="DEFAULT"), IMAGENET)
    published = zoo.get_model("googlenet", weights="DEFAULT", progress=False).eval()
    assert published.transform_input
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 3, 32, 32), dtype=np.uint8))
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    with torch.inference_mode():
        expected = published((pixels / 255 - mean) / std)
        torch.testing.assert_close(classifier.eval()(pixels), expected, rtol=1e-4, atol=1e-4)


def test_weights_for_another_size_say_which(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        published = zoo.get_model("vit_b_16", weights=None)
        monkeypatch.setattr(TorchvisionParams, "_download", lambda self, weights: published.state_dict())
        params = TorchvisionParams(arch="vit_b_16", weights="DEFAULT")
        network = params.build_network(CIFAR)
        with pytest.raises(
            ConfigError, match=r"images of 224x224 but the network takes 32x32: give image_size=\[224,224"
        ):
            params.load_published(network, CIFAR)


def test_published_weights_teach_the_classes_they_know(cache: Path) -> None:
    published = publish(cache, ARCH)
    params = TorchvisionParams(arch=ARCH, weights="DEFAULT")
    teacher = Teacher(params, IMAGENET, 4)
    assert teacher.fingerprint == fingerprint_state(published.state_dict())
    with pytest.raises(CheckpointError, match=r"last layer fresh cannot teach 10 classes before it has learned them"):
        Teacher(params, CIFAR, 4)
    with pytest.raises(CheckpointError, match=r"teacher\.checkpoint is not set"):
        Teacher(TorchvisionParams(arch=ARCH), IMAGENET, 4)


def test_a_student_may_learn_from_published_weights_alone() -> None:
    teacher = ["teacher=torchvision", f"teacher.arch={ARCH}"]
    assert build_config(compose([*teacher, "teacher.weights=DEFAULT"]), "distill").teacher.has_weights
    with pytest.raises(ConfigError, match=r"teacher\.checkpoint: not set"):
        build_config(compose(teacher), "distill")


# --- timm ---------------------------------------------------------------------------------------------------------


def fake_timm(create: Callable[..., nn.Module]) -> ModuleType:
    """The part of timm that is used, with one network, ``tiny``, and weights for three classes."""
    known, pretrained = ["tiny", "vast"], ["tiny.own", "tiny"]
    weights = SimpleNamespace(architecture="tiny", tag="own", num_classes=3, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    module = ModuleType("timm")
    vars(module).update(
        create_model=create,
        is_model=lambda name: name.partition(".")[0] in known,
        is_model_pretrained=lambda name: name in pretrained,
        list_models=lambda pretrained=False: ["tiny.own"] if pretrained else known,
        get_pretrained_cfg=lambda name: weights,
    )
    return module


def create_tiny(arch: str, *, pretrained: bool, num_classes: int, in_chans: int) -> nn.Module:
    body, head = nn.Conv2d(in_chans, 4, 3), nn.Linear(4, num_classes)
    if pretrained:
        nn.init.constant_(body.weight, 0.25)
    return nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)


def test_timm_builds_for_the_data_and_loads_what_it_publishes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", fake_timm(create_tiny))
    classifier, said = start(TimmParams(arch="tiny"))
    assert said == "fresh weights"
    assert describe_preprocessing(TimmParams(arch="tiny"), CIFAR)["mean"] == IMAGENET_MEAN

    params = TimmParams(arch="tiny.own", pretrained=True)
    classifier, said = start(params)
    assert said == "tiny.own of timm, last layer fresh"
    assert isinstance(classifier.network, nn.Sequential)
    weight: Tensor = classifier.network[0].weight
    assert weight.unique().tolist() == [0.25]
    assert describe_preprocessing(params, CIFAR) == {
        "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "image_size": None
    }  # fmt: skip
    assert describe_preprocessing(params, GREY)["mean"] == [0.5]
    assert start(params, InputSpec("image", (1, 8, 8), ("a", "b", "c")))[1] == "tiny.own of timm"
    assert params.architecture() == {"name": "timm", "arch": "tiny.own"}


def test_what_timm_does_not_have_names_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", fake_timm(create_tiny))
    with pytest.raises(ConfigError, match=r"timm has no network 'tinny': did you mean 'tiny'\?"):
        build_classifier(TimmParams(arch="tinny"), CIFAR)
    with pytest.raises(ConfigError, match=r"timm has no network 'xyz': timm\.list_models\(\) lists all"):
        build_classifier(TimmParams(arch="xyz"), CIFAR)
    with pytest.raises(ConfigError, match=r"timm has no weights for 'tiny\.on': did you mean 'tiny\.own'\?"):
        build_classifier(TimmParams(arch="tiny.on", pretrained=True), CIFAR)


def test_timm_weights_out_of_reach_are_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def create(arch: str, *, pretrained: bool, **arguments: Any) -> nn.Module:
        if pretrained:
            raise ConnectionError("name resolution failed\nsecond line")
        return create_tiny(arch, pretrained=False, **arguments)

    monkeypatch.setitem(sys.modules, "timm", fake_timm(create))
    with pytest.raises(
        CheckpointError, match=r"ConnectionError: name resolution failed\): let this machine reach hugg"
    ):
        start(TimmParams(arch="tiny", pretrained=True))


def test_without_timm_the_command_that_installs_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ModelError, match=r"needs the package timm, .* pip install 'distill-pipeline\[timm\]'\."):
        build_classifier(TimmParams(arch="resnet18"), CIFAR)


def test_timm_itself() -> None:
    pytest.importorskip("timm", reason="an optional package: pip install 'distill-pipeline[timm]'")
    classifier, said = start(TimmParams(arch="resnet10t"), GREY)
    assert said == "fresh weights"
    pixels = torch.zeros((4, 1, 32, 32), dtype=torch.uint8)
    assert classifier(pixels).shape == (4, 10)
    params = TimmParams(arch="resnet10t.c3_in1k", pretrained=True)
    assert describe_preprocessing(params, CIFAR)["mean"] == IMAGENET_MEAN
    with pytest.raises(ConfigError, match=r"timm has no network 'resnet10x': did you mean 'resnet10t'\?"):
        build_classifier(TimmParams(arch="resnet10x"), CIFAR)
