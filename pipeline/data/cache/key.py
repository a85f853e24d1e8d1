"""What the logits in a cache depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from pipeline.data.cache.params import EncodingParams

ABSENT = "(not there)"
"""Stands for the value of a field that one of two keys does not have."""


class CacheKey(EncodingParams):
    """Everything the logits in a cache depend on; its digest names the cache's folder.

    Not in it: labels, which rows the split holds, batch size, versions of libraries, device. They do not change what
    the teacher says of a row, beyond the last bits.
    """

    teacher: str
    """Fingerprint of the weights."""
    architecture: dict[str, Any]
    preprocessing: dict[str, Any]
    precision: str
    """The teacher computes in."""
    data: str
    """Fingerprint of the data set."""
    augment: dict[str, Any]
    """Every key of ``AugmentParams``."""
    seed: int | None
    """Of the augmentation; none where nothing is augmented."""
    num_views: int
    num_classes: int

    @property
    def digest(self) -> str:
        """16 hexadecimal digits."""
        return hashlib.sha256(_canonical(self.model_dump(mode="json")).encode()).hexdigest()[:16]

    @property
    def mixes(self) -> bool:
        """Whether images are mixed with others of their split, so that logits depend on which rows it holds."""
        return any(self.augment.get(name, 0) > 0 for name in ("mixup", "cutmix"))

    def differences(self, other: CacheKey) -> list[tuple[str, Any, Any]]:
        """The fields in which another key differs: path, value here, value there."""
        own, others = (_flatten(key.model_dump(mode="json")) for key in (self, other))
        paths = [*own, *(path for path in others if path not in own)]
        pairs = [(path, own.get(path, ABSENT), others.get(path, ABSENT)) for path in paths]
        return [pair for pair in pairs if _canonical(pair[1]) != _canonical(pair[2])]


def show_differences(differences: list[tuple[str, Any, Any]]) -> str:
    """Differences from a stored key for a message: ``augment.flip (stored true, wanted false)``."""
    return ", ".join(f"{path} (stored {_show(stored)}, wanted {_show(wanted)})" for path, stored, wanted in differences)


def _show(value: Any) -> str:
    return value if value == ABSENT else json.dumps(value)


def _canonical(value: Any) -> str:
    # 1, 1.0 and true are equal in Python, but not as text, and it is the text that is hashed.
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
