"""Parameters of a cache of teacher logits."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from pipeline.errors import ConfigError
from pipeline.registry import Params

MAX_TOPK_CLASSES = 2**16
"""Ids of classes are kept as uint16."""


class EncodingParams(Params):
    """How the logits of a row are stored."""

    format: Literal["dense", "topk"] = "dense"
    """dense: the logits of every class. topk: those of the k likeliest classes, and how much weight the others have at
    five temperatures; losses that need every class refuse it."""
    k: int | None = Field(default=None, ge=1)
    """Classes kept of a row; for format=topk, and only there."""
    dtype: Literal["float16", "float32"] = "float16"
    """Type of what is stored. float16: the distance to the row's largest logit, which is kept in float32 beside it."""

    @model_validator(mode="after")
    def _check_k(self) -> Self:
        if self.format == "topk" and self.k is None:
            raise ValueError("format=topk keeps the k likeliest classes, expected k, got none; set k=10, say")
        if self.format == "dense" and self.k is not None:
            raise ValueError(
                f"format=dense keeps every class, expected no k, got k={self.k}; set format=topk or k=null"
            )
        return self


class CacheParams(EncodingParams):
    """A cache of teacher logits, and how it is made."""

    path: str | None = None
    """Folder that holds caches, local or ``s3://bucket/folder``; each has a folder of its own in it, named by the hash
    of everything that its logits depend on. None: no cache."""


def check_classes(params: EncodingParams, num_classes: int) -> None:
    """Refuses an encoding that does not fit the number of classes.

    Raises:
        ConfigError: more classes to keep than there are, or more classes than their ids can tell apart.
    """
    if params.k is None:
        return
    if params.k > num_classes:
        raise ConfigError(
            f"cache.k={params.k} is more than the {num_classes} classes there are; set cache.k to less, or "
            "cache.format=dense cache.k=null to keep them all."
        )
    if num_classes > MAX_TOPK_CLASSES:
        raise ConfigError(
            f"cache.format=topk keeps class numbers as uint16, expected at most {MAX_TOPK_CLASSES} classes, got "
            f"{num_classes}; set cache.format=dense cache.k=null."
        )
