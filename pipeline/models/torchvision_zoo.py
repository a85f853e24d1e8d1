"""Torchvision's classification networks."""

from __future__ import annotations

import difflib
from typing import Any, Literal

from torch import nn

from pipeline.contracts.columns import InputSpec
from pipeline.errors import ConfigError, ModelError
from pipeline.models.params import MODELS, ModelParams

# These return more than the logits in training unless told otherwise.
_WITHOUT_AUXILIARY: dict[str, Any] = {"aux_logits": False, "init_weights": True}
_EXTRA_ARGUMENTS = {"googlenet": _WITHOUT_AUXILIARY, "inception_v3": _WITHOUT_AUXILIARY}


@MODELS.register
class TorchvisionParams(ModelParams):
    """A classification network of torchvision with fresh weights; images of three channels."""

    name: Literal["torchvision"] = "torchvision"
    arch: str
    """Torchvision's name for it, such as ``resnet18``."""

    def build_network(self, spec: InputSpec) -> nn.Module:
        """Raises ConfigError for an unknown ``arch`` and ModelError for images without three channels."""
        # Here, because the import takes a second and few runs need it.
        import torchvision.models as zoo

        known = zoo.list_models(module=zoo)
        if self.arch not in known:
            near = difflib.get_close_matches(self.arch, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}."
            raise ConfigError(f"torchvision has no classification network {self.arch!r}: {hint}")
        if spec.kind != "image" or spec.shape[0] != 3:
            got = f"{spec.shape[0]} channels" if spec.kind == "image" else "features"
            raise ModelError(
                f"torchvision's {self.arch!r} takes images of 3 channels but the data has {got}: "
                "choose another model (small_cnn, resnet20, mlp), or data with colour images."
            )
        extra = _EXTRA_ARGUMENTS.get(self.arch, {})
        network: nn.Module = zoo.get_model(self.arch, weights=None, num_classes=spec.num_classes, **extra)
        return network
