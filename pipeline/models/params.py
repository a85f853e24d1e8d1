"""Parameters common to all models, and those that only a teacher has."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Literal, Self

from pydantic import Field, model_validator
from torch import nn

from pipeline.contracts.columns import InputSpec
from pipeline.registry import Params, Registry


class ModelParams(Params):
    """A network: how to build it, where its weights are, how its input is normalised."""

    name: str
    checkpoint: str | None = None
    """Weights to start from: a run folder, a folder with ``model.safetensors``, or a file with a state
    dict (``.safetensors``, or ``.pt``/``.pth`` written by ``torch.save``); none: fresh weights."""
    mean: tuple[float, ...] | None = None
    """Per channel, of pixels in 0..1 (per feature for features); none: ImageNet's for three channels,
    else 0.5, and nothing for features."""
    std: tuple[float, ...] | None = None
    """Like ``mean``."""

    @abstractmethod
    def build_network(self, spec: InputSpec) -> nn.Module:
        """A fresh network: normalised float32 input (B, \\*spec.shape) to logits (B, spec.num_classes)."""

    def architecture(self) -> dict[str, Any]:
        """What the weights depend on: all but the checkpoint, the normalisation and a teacher's settings."""
        others = {"checkpoint", "mean", "std", *TeacherParams.model_fields}
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
    """Of each actor."""
    num_gpus: float = Field(default=0.0, ge=0)
    """Of each actor; a fraction shares a GPU."""
    accelerator_type: str | None = None
    """Only on nodes with this accelerator, by Ray's name for it."""
    resources: dict[str, float] = Field(default_factory=dict)
    """Custom resources of each actor."""
    label_selector: dict[str, str] = Field(default_factory=dict)
    """Only on nodes with these labels."""
    max_task_retries: int = Field(default=3, ge=0)
    """How often a batch is tried again after its actor died."""
    no_progress_timeout_s: float = Field(default=1800.0, gt=0)
    """The run fails when the stream stands still for so long; above the longest validation pass."""

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
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of the forward pass; ``auto``: bf16 on GPU, fp32 on CPU."""
    compile: bool = False
    """``torch.compile`` the network."""
