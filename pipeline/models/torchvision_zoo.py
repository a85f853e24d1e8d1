"""Torchvision's classification networks, fresh or with the weights that torchvision publishes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal
from urllib.parse import urlsplit

import torch
from torch import Tensor, nn

from pipeline.contracts.columns import InputSpec
from pipeline.errors import CheckpointError, ConfigError, ModelError
from pipeline.models.classifier import describe_error, suggest_name
from pipeline.models.params import MODELS, ModelParams, Normalisation, Published

# These return more than the logits in training unless told otherwise.
_WITHOUT_AUXILIARY: dict[str, Any] = {"aux_logits": False, "init_weights": True}
_EXTRA_ARGUMENTS = {"googlenet": _WITHOUT_AUXILIARY, "inception_v3": _WITHOUT_AUXILIARY}

# Their published weights take pixels in -1..1. Torchvision converts inside the network, but only where it loads the
# weights itself; as normalisation it is kept with the model.
_CONVERTS_INSIDE = ("googlenet", "inception_v3")


@MODELS.register
class TorchvisionParams(ModelParams):
    """A classification network of torchvision; images of three channels."""

    images_only: ClassVar[bool] = True
    origin: ClassVar[tuple[str, ...]] = (*ModelParams.origin, "weights")

    name: Literal["torchvision"] = "torchvision"
    arch: str
    """Torchvision's name for it, such as ``resnet18``."""
    weights: str | None = None
    """Torchvision's name for weights of ``arch``, such as ``DEFAULT`` or ``IMAGENET1K_V2``; the last layer is fresh
    unless the data has as many classes as they. Not loaded where ``checkpoint`` is given; none: fresh weights."""

    def build_network(self, spec: InputSpec) -> nn.Module:
        """Raises ConfigError for an unknown ``arch`` or ``weights``, ModelError for images without three channels."""
        # Here, because the import takes a second and few runs need it.
        import torchvision.models as zoo

        self._check_arch()
        self._find_weights()
        if spec.shape[0] != 3:
            raise ModelError(
                f"torchvision's {self.arch!r} takes images of 3 channels but the data has {spec.shape[0]} channels: "
                "choose another model (small_cnn, resnet20, mlp), or data with colour images."
            )
        extra = dict(_EXTRA_ARGUMENTS.get(self.arch, {}))
        if self.arch.startswith("vit_"):
            extra["image_size"] = spec.shape[1]
        elif self.arch.startswith("maxvit_"):
            extra["input_size"] = spec.shape[1:]
        network: nn.Module = zoo.get_model(self.arch, weights=None, num_classes=spec.num_classes, **extra)
        return network

    def load_published(self, network: nn.Module, spec: InputSpec) -> Published | None:
        """The weights that ``weights`` names; see ``ModelParams.load_published``."""
        weights = self._find_weights()
        if weights is None:
            return None
        published = self._download(weights)
        own = network.state_dict()
        last_layer = list(own)[-1].rpartition(".")[0]
        fresh = {name for name, tensor in own.items() if published[name].shape != tensor.shape}
        if any(name.rpartition(".")[0] != last_layer for name in fresh):
            height, width = weights.meta["min_size"]
            raise ConfigError(
                f"weights {weights.name} of torchvision's {self.arch!r} are for images of {height}x{width} but the "
                f"network takes {spec.shape[1]}x{spec.shape[2]}: give image_size=[{height},{width}]."
            )
        network.load_state_dict({name: own[name] if name in fresh else published[name] for name in own})
        return Published(f"{weights.name} of torchvision", whole=not fresh)

    def published_normalisation(self) -> Normalisation | None:
        weights = self._find_weights()
        if weights is None:
            return None
        if self.arch in _CONVERTS_INSIDE:
            return (0.5,) * 3, (0.5,) * 3
        preset = weights.transforms()
        return tuple(preset.mean), tuple(preset.std)

    def _check_arch(self) -> None:
        import torchvision.models as zoo

        known = zoo.list_models(module=zoo)
        if self.arch not in known:
            raise ConfigError(
                f"torchvision has no classification network {self.arch!r}: {suggest_name(self.arch, known)}"
            )

    def _find_weights(self) -> Any:
        """The member of torchvision's enumeration that ``weights`` names, or none.

        Raises:
            ConfigError: there is no such member, or no such network.
        """
        if self.weights is None:
            return None
        import torchvision.models as zoo

        self._check_arch()
        members = zoo.get_model_weights(self.arch).__members__
        known = {name: weights for name, weights in members.items() if weights.meta["categories"]}  # not for features
        if self.weights not in known:
            hint = suggest_name(self.weights, known) if known else "none are published."
            raise ConfigError(f"torchvision has no weights {self.weights!r} for {self.arch!r}: {hint}")
        return known[self.weights]

    def _download(self, weights: Any) -> dict[str, Tensor]:
        """The state dict of the published network, from torch's cache where that has it.

        Raises:
            CheckpointError: it cannot be downloaded or read.
        """
        import torchvision.models as zoo

        try:
            # Torchvision's own loading would run code that is in the file. This one would not and fails if there is
            # any; after it the file is in the cache, and torchvision may read it for what it does to names.
            weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
            published: nn.Module = zoo.get_model(self.arch, weights=weights, progress=False)
        except Exception as error:  # whatever the network, the file or torch's cache raise
            file = Path(torch.hub.get_dir(), "checkpoints", Path(urlsplit(weights.url).path).name)
            raise CheckpointError(
                f"weights {weights.name} of torchvision's {self.arch!r} cannot be loaded from {weights.url} "
                f"({describe_error(error)}): let this machine reach {urlsplit(weights.url).hostname}, "
                f"or put the file at {file}."
            ) from error
        state_dict: dict[str, Tensor] = published.state_dict()
        return state_dict
