"""Names of the columns that blocks carry, and what a data set looks like to a network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

SAMPLE_ID = "sample_id"  # int64: row number over the source's files in sorted order
VIEW = "view"  # int32: which augmented view of the sample
BLOCK = "block"  # int64: position of the block in the run
INPUT = "input"  # uint8 (C, H, W) pixels, or float32 (F,) features
LABEL = "label"  # int64 class number, or NO_LABEL
PARTNER_LABEL = "partner_label"  # int64; only where images are mixed: the label of the image mixed in
LABEL_WEIGHT = "label_weight"  # float32; only where images are mixed: weight of ``label``, the partner's is the rest
TEACHER_LOGITS = "teacher_logits"  # float32 (num_classes,), free of temperature
ENCODED = "encoded"  # source column as stored: encoded image bytes, raw values or a feature list

NO_LABEL = -1

SplitName = Literal["train", "validation", "test"]
SPLITS: tuple[SplitName, ...] = ("train", "validation", "test")


@dataclass(frozen=True)
class InputSpec:
    """What a network takes and how many classes it tells apart.

    Attributes:
        kind: ``"image"`` (uint8 pixels) or ``"features"`` (float32 vectors).
        shape: (channels, height, width) or (features,).
        class_names: one name per class, in the order of the label numbers.
    """

    kind: Literal["image", "features"]
    shape: tuple[int, ...]
    class_names: tuple[str, ...]

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "shape": list(self.shape), "class_names": list(self.class_names)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> InputSpec:
        return cls(values["kind"], tuple(values["shape"]), tuple(values["class_names"]))
