"""Parameters common to all models, and those that only a teacher has."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, PositiveInt, model_validator
from torch import nn

from pipeline.contracts.columns import InputSpec
from pipeline.registry import Params, Registry

Normalisation = tuple[tuple[float, ...], tuple[float, ...]]  # mean and std, one value per channel or feature


@dataclass(frozen=True)
class Published:
    """Published weights in a network.

    Attributes:
        name: for people.
        whole: every layer is theirs; else the last one is fresh, since the data has another number of classes.
    """

    name: str
    whole: bool

    def __str__(self) -> str:
        return self.name if self.whole else f"{self.name}, last layer fresh"


class ModelParams(Params):
    """A network: how to build it, where its weights are, how its input is normalised."""

    images_only: ClassVar[bool] = False
    requirements: ClassVar[tuple[str, ...]] = ()  # packages that it needs besides what this one depends on
    origin: ClassVar[tuple[str, ...]] = ("checkpoint",)  # fields that say where the weights come from

    name: str
    """Which network; ``teacher=NAME`` and ``student=NAME`` set it."""
    checkpoint: str | None = None
    """Weights to start from: a run folder, a folder with ``model.safetensors``, or a file with a state
    dict (``.safetensors``, or ``.pt``/``.pth`` written by ``torch.save``); none: fresh weights."""
    mean: tuple[float, ...] | None = None
    """Mean per channel, of pixels in 0..1 (per feature for features); none: what published weights were trained
    with, else ImageNet's for three channels, else 0.5, and nothing for features."""
    std: tuple[float, ...] | None = None
    """Standard deviation, otherwise like ``mean``."""
    image_size: tuple[PositiveInt, PositiveInt] | None = None
    """Height and width that images are resized to on the network's device (bilinear, antialiased); none: the data's."""

    @abstractmethod
    def build_network(self, spec: InputSpec) -> nn.Module:
        """A fresh network: normalised float32 input (B, \\*spec.shape) to logits (B, spec.num_classes)."""

    def load_published(self, network: nn.Module, spec: InputSpec) -> Published | None:
        """Loads published weights into a fresh network, where the parameters ask for some.

        Args:
            network: from ``build_network``.
            spec: what it was built for.

        Returns:
            what was loaded; none: nothing.

        Raises:
            CheckpointError: they cannot be downloaded or read.
        """
        return None

    def published_normalisation(self) -> Normalisation | None:
        """What the published weights that the parameters ask for were trained with."""
        return None

    @property
    def has_weights(self) -> bool:
        """Whether the parameters say where weights are."""
        return any(getattr(self, field) for field in self.origin)

    def architecture(self) -> dict[str, Any]:
        """What a network is built from: all but where its weights are, its preprocessing and a teacher's settings."""
        others = {*self.origin, "mean", "std", "image_size", *TeacherParams.model_fields}
        return self.model_dump(mode="json", exclude=others)

    @model_validator(mode="after")
    def _check_std(self) -> Self:
        if any(value <= 0 for value in self.std or ()):
            raise ValueError("std must be above 0 for every channel")
        return self


MODELS: Registry[ModelParams] = Registry("model", "pipeline.models")


class PoolParams(Params):
    """The teacher's actors: how many, what each holds, and how failures are met."""

    min: int = Field(default=1, ge=1)
    """Actors at the start, and at least."""
    max: int | None = Field(default=None, ge=1)
    """Actors at most; none: ``min``."""
    num_cpus: float = Field(default=1.0, ge=0)
    """CPUs that each actor holds."""
    num_gpus: float = Field(default=0.0, ge=0)
    """GPUs that each actor holds; a fraction shares a GPU."""
    accelerator_type: str | None = None
    """Only on nodes with this accelerator, by Ray's name for it."""
    resources: dict[str, float] = Field(default_factory=dict)
    """Custom resources of each actor."""
    label_selector: dict[str, str] = Field(default_factory=dict)
    """Only on nodes with these labels."""
    max_task_retries: int = Field(default=3, ge=0)
    """How often a batch is tried again after its actor died."""
    no_progress_timeout_s: float = Field(default=1800.0, gt=0)
    """Seconds that the stream may stand still before the run fails; above the longest validation pass."""

    @model_validator(mode="after")
    def _check_size(self) -> Self:
        if self.max is not None and self.max < self.min:
            raise ValueError(f"max={self.max} is below min={self.min}")
        return self


class TeacherParams(Params):
    """What a teacher has besides a model's parameters; combined with a model's by inheritance."""

    source: Literal["online", "cached", "fill"] = "online"
    """Logits computed while training, read from a cache, or computed once and then read."""
    pool: PoolParams = PoolParams()
    """The actors that compute its logits."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision of the forward pass; ``auto``: bf16 on GPU, fp32 on CPU."""
    compile: bool = False
    """``torch.compile`` the network."""
