"""The networks of timm, an optional package: ``pip install 'distill-pipeline[timm]'``."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from torch import nn

from pipeline.contracts.columns import InputSpec
from pipeline.errors import CheckpointError, ConfigError, ModelError
from pipeline.models.classifier import describe_error, suggest_name
from pipeline.models.params import MODELS, ModelParams, Normalisation, Published

_ALL = "timm.list_models() lists all, with pretrained=True those with weights."


def _import_timm() -> Any:
    try:
        import timm
    except ImportError as error:
        raise ModelError(
            f"model 'timm' needs the package timm, which cannot be imported ({describe_error(error)}): "
            "install it with pip install 'distill-pipeline[timm]'."
        ) from error
    return timm


@MODELS.register
class TimmParams(ModelParams):
    """A network of timm; images of any number of channels."""

    images_only: ClassVar[bool] = True
    requirements: ClassVar[tuple[str, ...]] = ("timm",)
    origin: ClassVar[tuple[str, ...]] = (*ModelParams.origin, "pretrained")

    name: Literal["timm"] = "timm"
    arch: str
    """Timm's name for it, such as ``resnet18``, or with the tag of some weights, ``resnet18.a1_in1k``."""
    pretrained: bool = False
    """Start from the weights that timm publishes for ``arch``; the last layer is fresh unless the data has as many
    classes as they. Not loaded where ``checkpoint`` is given."""

    def build_network(self, spec: InputSpec) -> nn.Module:
        """Raises ConfigError for an unknown ``arch`` and ModelError where timm is not installed."""
        self._check_arch()
        return self._create(spec, pretrained=False)

    def load_published(self, network: nn.Module, spec: InputSpec) -> Published | None:
        """Timm's weights where ``pretrained``; see ``ModelParams.load_published``."""
        if not self.pretrained:
            return None
        weights = self._pretrained_config()
        try:
            published = self._create(spec, pretrained=True)
        except Exception as error:  # whatever the network, the file or the hub's cache raise
            raise CheckpointError(
                f"the weights of timm's {self.arch!r} cannot be loaded ({describe_error(error)}): let this machine "
                "reach huggingface.co (with the package huggingface_hub), or give a file as checkpoint=PATH."
            ) from error
        network.load_state_dict(published.state_dict())
        name = f"{weights.architecture}.{weights.tag} of timm"
        return Published(name, whole=weights.num_classes == spec.num_classes)

    def published_normalisation(self) -> Normalisation | None:
        if not self.pretrained:
            return None
        weights = self._pretrained_config()
        return tuple(weights.mean), tuple(weights.std)

    def _create(self, spec: InputSpec, *, pretrained: bool) -> nn.Module:
        network: nn.Module = _import_timm().create_model(
            self.arch, pretrained=pretrained, num_classes=spec.num_classes, in_chans=spec.shape[0]
        )
        return network

    def _check_arch(self) -> None:
        timm = _import_timm()
        if not timm.is_model(self.arch):
            raise ConfigError(f"timm has no network {self.arch!r}: {suggest_name(self.arch, timm.list_models(), _ALL)}")

    def _pretrained_config(self) -> Any:
        """What timm knows of the weights for ``arch``.

        Raises:
            ConfigError: it has no such weights.
        """
        self._check_arch()
        timm = _import_timm()
        if not timm.is_model_pretrained(self.arch):
            known = timm.list_models(pretrained=True)
            raise ConfigError(f"timm has no weights for {self.arch!r}: {suggest_name(self.arch, known, _ALL)}")
        return timm.get_pretrained_cfg(self.arch)
