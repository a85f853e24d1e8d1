"""Augmentation as a pure function of (seed, view, sample id).

So teacher and student see the same pixels, whatever block a sample comes in, whichever process decodes it and
however often the run was restarted.

In this order: the box of a random resized crop is cut out while the image is decoded; a crop with padding; a flip;
brightness, contrast and saturation; RandAugment; and last, mixing with another image (``pipeline.data.pixels.mixing``).
"""

from __future__ import annotations

import json
from typing import Self

import numpy as np
from pydantic import Field, model_validator

from pipeline.contracts.columns import InputSpec
from pipeline.data.pixels.draws import Number, draw, draw_uniform, sample_keys
from pipeline.data.pixels.randaugment import (
    BRIGHTNESS,
    CONTRAST,
    MAX_MAGNITUDE,
    SATURATION,
    Changes,
    apply_changes,
    draw_operations,
)
from pipeline.errors import ConfigError
from pipeline.registry import Params

# Of a random resized crop: width over height.
_RATIOS = (3 / 4, 4 / 3)
_TRIES = 10


class AugmentParams(Params):
    """Random changes to training images; every view of a sample draws its own.

    The default of each switches it off.
    """

    crop_padding: int = Field(default=0, ge=0)
    """Pixels of zeros on each side, out of which a random crop of the original size is taken; 0: no crop."""
    random_resized_crop: tuple[float, float] | None = None
    """Smallest and largest share of the stored image's area that is cut out, at a ratio of width to height between
    3/4 and 4/3, and resized; none: no such crop."""
    flip: bool = False
    """Mirror half of the images left to right."""
    brightness: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Brightness is multiplied by a factor from max(0, 1 - brightness) to 1 + brightness; 0: left as it is."""
    contrast: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """The same of the distance to the image's mean grey."""
    saturation: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """The same of the distance to the pixel's grey."""
    randaugment: int = Field(default=0, ge=0)
    """Operations of RandAugment (arXiv 1909.13719) an image, drawn from torchvision's 14; 0: none."""
    randaugment_magnitude: int = Field(default=9, ge=0, le=MAX_MAGNITUDE)
    """How strong they are, 0 to 30."""
    mixup: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Concentration of the Beta distribution that weighs an image and its partner (arXiv 1710.09412); 0: no mixup."""
    cutmix: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """The same of the area that the partner pastes over (arXiv 1905.04899); 0: no cutmix. With both, each sample takes
    one of them, by a fair draw."""

    @model_validator(mode="after")
    def _check_crops(self) -> Self:
        if self.random_resized_crop is not None:
            low, high = self.random_resized_crop
            if not 0 < low <= high <= 1:
                raise ValueError(
                    f"random_resized_crop is the smallest and the largest share of the area, expected "
                    f"0 < smallest <= largest <= 1, got [{low}, {high}]"
                )
            if self.crop_padding > 0:
                raise ValueError(
                    f"crop_padding={self.crop_padding} and random_resized_crop=[{low}, {high}] are two ways to crop; "
                    "set crop_padding=0 or random_resized_crop=null"
                )
        return self

    @property
    def varies(self) -> bool:
        """Whether two views of a sample may differ."""
        return self.changes_inputs or self.random_resized_crop is not None or self.mixes

    @property
    def changes_inputs(self) -> bool:
        """Whether ``augment`` has anything to do."""
        return self.crop_padding > 0 or self.flip or self.recolors

    @property
    def recolors(self) -> bool:
        """Whether anything is done that Pillow does, image by image."""
        return self.brightness > 0 or self.contrast > 0 or self.saturation > 0 or self.randaugment > 0

    @property
    def mixes(self) -> bool:
        """Whether each image is mixed with another, and its label with the other's."""
        return self.mixup > 0 or self.cutmix > 0


def check_augment(params: AugmentParams, spec: InputSpec) -> None:
    """Refuses what the inputs cannot have done to them.

    Raises:
        ConfigError: augmentation of feature vectors; colours of images that have neither one channel nor three.
    """
    if spec.kind != "image":
        _refuse(params, list(AugmentParams.model_fields), "images", "holds feature vectors")
    elif spec.shape[0] not in (1, 3):
        recolorings = ["brightness", "contrast", "saturation", "randaugment"]
        _refuse(params, recolorings, "grey or RGB images", f"holds images of {spec.shape[0]} channels")


def _refuse(params: AugmentParams, names: list[str], wanted: str, got: str) -> None:
    off = {name: AugmentParams.model_fields[name].default for name in names if name != "randaugment_magnitude"}
    used = [name for name in off if getattr(params, name) != off[name]]
    if used:
        listed = " and ".join([", ".join(used[:-1]), used[-1]] if len(used) > 1 else used)
        settings = " ".join(f"data.augment.{name}={json.dumps(off[name])}" for name in used)
        raise ConfigError(
            f"data.augment: {listed} {'are' if len(used) > 1 else 'is'} for {wanted}, but this data set {got}; "
            f"set {settings}."
        )


def augment(inputs: np.ndarray, sample_ids: np.ndarray, view: int, seed: int, params: AugmentParams) -> np.ndarray:
    """Crops, flips and recolours each image as its sample id, the view and the seed say.

    Args:
        inputs: uint8 (B, C, H, W).
        sample_ids: (B,) int64.
        view: number of the view.
        seed: of the run.
        params: what to do.

    Returns:
        uint8 (B, C, H, W); ``inputs`` itself when there is nothing to do.

    Raises:
        ConfigError: ``inputs`` are feature vectors, or have other than 1 or 3 channels where colours are to change.
    """
    if not params.changes_inputs:
        return inputs
    check_augment(params, InputSpec("image" if inputs.ndim == 4 else "features", inputs.shape[1:], ()))
    keys = sample_keys(sample_ids, view, seed)
    outputs = _crop(inputs, keys, params.crop_padding) if params.crop_padding else inputs.copy()
    if params.flip:
        flipped = np.flatnonzero(draw(keys, Number.FLIP, 2))
        outputs[flipped] = outputs[flipped, :, :, ::-1]
    if params.recolors:
        apply_changes(outputs, _draw_changes(keys, inputs.shape[2], inputs.shape[3], params))
    return outputs


def _draw_changes(keys: np.ndarray, height: int, width: int, params: AugmentParams) -> list[Changes]:
    """Colour jitter in a fixed order, where torchvision draws the order too, and then RandAugment."""
    changes: list[Changes] = [[] for _ in keys]
    for operation, number, extent in (
        (BRIGHTNESS, Number.BRIGHTNESS, params.brightness),
        (CONTRAST, Number.CONTRAST, params.contrast),
        (SATURATION, Number.SATURATION, params.saturation),
    ):
        if extent > 0:
            low = -min(extent, 1.0)  # no factor is below 0
            amounts = low + (extent - low) * draw_uniform(keys, number)
            for row, amount in enumerate(amounts.tolist()):
                changes[row].append((operation, amount))
    drawn = draw_operations(keys, params.randaugment, params.randaugment_magnitude, height, width)
    return [jitter + operations for jitter, operations in zip(changes, drawn, strict=True)]


def _crop(inputs: np.ndarray, keys: np.ndarray, padding: int) -> np.ndarray:
    num_rows, channels, height, width = inputs.shape
    padded = np.zeros((num_rows, channels, height + 2 * padding, width + 2 * padding), np.uint8)
    padded[:, :, padding:-padding, padding:-padding] = inputs
    below = 2 * padding + 1
    tops, lefts = draw(keys, Number.CROP_TOP, below).tolist(), draw(keys, Number.CROP_LEFT, below).tolist()
    crops: np.ndarray = np.empty_like(inputs)
    # One slice an image copies whole lines: faster than one gather over the batch.
    for row, (top, left) in enumerate(zip(tops, lefts, strict=True)):
        crops[row] = padded[row, :, top : top + height, left : left + width]
    return crops


def draw_boxes(sizes: np.ndarray, sample_ids: np.ndarray, view: int, seed: int, params: AugmentParams) -> np.ndarray:
    """The part of each stored image that a random resized crop cuts out (arXiv 1409.4842, as torchvision draws it).

    The first of ten tries that lies within the image; failing that, the largest box in its centre whose ratio of
    width to height lies between 3/4 and 4/3.

    Args:
        sizes: (B, 2) int64, height and width of the stored images.
        sample_ids: (B,) int64.
        view: number of the view.
        seed: of the run.
        params: with ``random_resized_crop``.

    Returns:
        (B, 4) int64: left, top, right, bottom; right and bottom are the first column and row outside.
    """
    if params.random_resized_crop is None:
        raise ValueError("random_resized_crop is off")
    low, high = params.random_resized_crop
    keys = sample_keys(sample_ids, view, seed)
    heights, widths = sizes[:, 0], sizes[:, 1]
    boxes = _central_boxes(heights, widths)
    open_rows = np.ones(len(sizes), bool)
    for attempt in range(_TRIES):
        area, ratio, top, left = range(Number.BOX + 4 * attempt, Number.BOX + 4 * attempt + 4)
        areas = heights * widths * (low + (high - low) * draw_uniform(keys, area))
        logs = np.log(_RATIOS[0]) + np.log(_RATIOS[1] / _RATIOS[0]) * draw_uniform(keys, ratio)
        box_widths = np.rint(np.sqrt(areas * np.exp(logs))).astype(np.int64)
        box_heights = np.rint(np.sqrt(areas / np.exp(logs))).astype(np.int64)
        fits = (box_widths > 0) & (box_widths <= widths) & (box_heights > 0) & (box_heights <= heights) & open_rows
        tops = draw(keys, top, np.maximum(heights - box_heights + 1, 1))
        lefts = draw(keys, left, np.maximum(widths - box_widths + 1, 1))
        drawn = np.stack([lefts, tops, lefts + box_widths, tops + box_heights], axis=1)
        boxes[fits] = drawn[fits]
        open_rows &= ~fits
    return boxes


def _central_boxes(heights: np.ndarray, widths: np.ndarray) -> np.ndarray:
    box_widths = np.minimum(widths, np.rint(heights * _RATIOS[1]).astype(np.int64))
    box_heights = np.minimum(heights, np.rint(widths / _RATIOS[0]).astype(np.int64))
    lefts, tops = (widths - box_widths) // 2, (heights - box_heights) // 2
    return np.stack([lefts, tops, lefts + box_widths, tops + box_heights], axis=1)
