"""A network together with the preprocessing of its input: size and normalisation."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Collection
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.contracts.columns import InputSpec
from pipeline.errors import ConfigError, ModelError, PipelineError
from pipeline.models.params import ModelParams, Normalisation

_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)


class Classifier(nn.Module):
    """Raw input to logits: scales, resizes and normalises on the device, then runs the network.

    Weights are saved and loaded as ``network``'s own; size, mean and std belong to the parameters.

    Args:
        network: normalised float input to logits (B, C).
        spec: what the raw input looks like.
        normalisation: mean and std, one value per channel or feature; none: the input as it is.
        image_size: height and width that the network takes; none: those of ``spec``.
    """

    mean: Tensor | None
    std: Tensor | None

    def __init__(
        self,
        network: nn.Module,
        spec: InputSpec,
        normalisation: Normalisation | None,
        image_size: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.spec = spec
        self.image_size = None if image_size == spec.shape[1:] else image_size
        shape = (-1, 1, 1) if spec.kind == "image" else (-1,)
        mean, std = (torch.tensor(values).view(shape) for values in normalisation) if normalisation else (None, None)
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits (B, C) of uint8 pixels (B, channels, height, width) or of float32 features (B, F)."""
        if self.spec.kind == "image":
            if inputs.dtype != torch.uint8:
                raise ModelError(
                    f"the classifier got {inputs.dtype} pixels but takes uint8 in 0..255: pass them unscaled."
                )
            inputs = inputs.float() / 255
            if self.image_size is not None:
                inputs = F.interpolate(inputs, self.image_size, mode="bilinear", antialias=True)
        if self.mean is not None and self.std is not None:
            inputs = (inputs - self.mean) / self.std
        logits: Tensor = self.network(inputs)
        return logits


def network_spec(params: ModelParams, spec: InputSpec) -> InputSpec:
    """What the network itself takes: the data's images, resized where the parameters say so.

    Raises:
        ConfigError: features cannot be resized.
    """
    if params.image_size is None:
        return spec
    if spec.kind != "image":
        raise ConfigError(
            f"image_size of {params.name!r} is {list(params.image_size)} but the data has features, "
            "which cannot be resized: leave it out."
        )
    return dataclasses.replace(spec, shape=(spec.shape[0], *params.image_size))


def describe_preprocessing(params: ModelParams, spec: InputSpec) -> dict[str, Any]:
    """``mean``, ``std`` and ``image_size`` as plain values, the defaults of the first two filled in."""
    mean, std = resolve_normalisation(params, spec) or (None, None)
    values = {"mean": mean, "std": std, "image_size": params.image_size}
    return {name: value and list(value) for name, value in values.items()}


def resolve_normalisation(params: ModelParams, spec: InputSpec) -> Normalisation | None:
    """Mean and std with the defaults filled in; none for features without either.

    Raises:
        ConfigError: not one value per channel (or feature).
    """
    count = spec.shape[0]
    mean, std = params.mean, params.std
    if spec.kind == "image":
        default_mean, default_std = params.published_normalisation() or (_IMAGENET_MEAN, _IMAGENET_STD)
        fits = count == len(default_mean)
        mean = mean or (default_mean if fits else (0.5,) * count)
        std = std or (default_std if fits else (0.5,) * count)
    elif mean or std:
        mean = mean or (0.0,) * count
        std = std or (1.0,) * count
    else:
        return None
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != count:
            what = "channels" if spec.kind == "image" else "features"
            raise ConfigError(
                f"{name} of {params.name!r} has {len(values)} values but the data has {count} {what}: "
                f"give {name} one value for each, or leave it out."
            )
    return mean, std


@torch.no_grad()
def class_similarity(classifier: Classifier) -> np.ndarray:
    """How alike a trained network takes the classes to be: cosines of the rows of its last layer's weight.

    Returns:
        (C, C) float32, symmetric, 1 on the diagonal.

    Raises:
        ModelError: no linear layer of the network has one output a class.
    """
    num_classes = classifier.spec.num_classes
    layers = [module for module in classifier.modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    last = next((layer for layer in reversed(layers) if layer.weight.shape[0] == num_classes), None)
    if last is None:
        raise ModelError(
            f"the teacher has no linear layer with {num_classes} outputs, so it does not say which classes are alike: "
            "choose another loss, or a teacher that ends in a linear layer."
        )
    rows = F.normalize(last.weight.detach().float().flatten(1), dim=1)
    return (rows @ rows.T).cpu().numpy()


def build_classifier(params: ModelParams, spec: InputSpec) -> Classifier:
    """Builds the network with fresh weights and tries it on two rows.

    Raises:
        ConfigError: mean or std have the wrong length, or there are no images to resize.
        ModelError: the network cannot be built or run, or does not return logits (2, num_classes).
    """
    if params.images_only and spec.kind != "image":
        raise ModelError(
            f"model {params.name!r} takes images but the data has features: choose mlp, or your own network (custom)."
        )
    resized = network_spec(params, spec)
    normalisation = resolve_normalisation(params, spec)
    size = "x".join(map(str, resized.shape))
    what = f"model {params.name!r} for {spec.kind} input of size {size} and {spec.num_classes} classes"
    try:
        network = params.build_network(resized)
    except PipelineError:
        raise
    except Exception as error:  # whatever a network's constructor raises
        raise ModelError(f"{what} cannot be built: {describe_error(error)}; check the model's parameters.") from error
    if not isinstance(network, nn.Module):
        raise ModelError(
            f"{what} is a {type(network).__name__}, expected a torch.nn.Module: return the network itself."
        )
    classifier = Classifier(network, spec, normalisation, params.image_size)
    _check_output(classifier, what)
    return classifier


def _check_output(classifier: Classifier, what: str) -> None:
    spec = classifier.spec
    rows = torch.zeros((2, *spec.shape), dtype=torch.uint8 if spec.kind == "image" else torch.float32)
    classifier.eval()
    try:
        with torch.no_grad():
            logits = classifier(rows)
    except Exception as error:  # whatever a network's forward raises
        remedy = ", or give image_size=[HEIGHT,WIDTH]" if spec.kind == "image" else ""
        raise ModelError(
            f"{what} fails on a batch of two rows: {describe_error(error)}; "
            f"choose a model that takes this input{remedy}."
        ) from error
    classifier.train()
    if not isinstance(logits, Tensor):
        raise ModelError(f"{what} returns a {type(logits).__name__}, expected the logits alone: return one tensor.")
    if logits.shape != (2, spec.num_classes):
        raise ModelError(
            f"{what} returns shape {tuple(logits.shape)} for a batch of two rows, expected (2, {spec.num_classes}): "
            "build it with one output per class."
        )


def describe_error(error: Exception) -> str:
    """The error's type and the first line of its message."""
    first_line = next(iter(str(error).splitlines()), "").rstrip(". ")
    return f"{type(error).__name__}: {first_line}" if first_line else type(error).__name__


def suggest_name(name: str, known: Collection[str], otherwise: str | None = None) -> str:
    """What to say after an unknown name: the nearest known one, else ``otherwise`` or all of them."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}?" if near else otherwise or f"known are {', '.join(known)}."
