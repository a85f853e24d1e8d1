"""Augmentation as a pure function of (seed, view, sample id).

So teacher and student see the same pixels, whatever block a sample comes in, whichever process decodes it and
however often the run was restarted.
"""

from __future__ import annotations

import numpy as np
from pydantic import Field

from pipeline.contracts.columns import InputSpec
from pipeline.errors import ConfigError
from pipeline.registry import Params


class AugmentParams(Params):
    """Random changes to training images; every view of a sample draws its own."""

    crop_padding: int = Field(default=0, ge=0)
    """Pixels of zeros on each side, out of which a random crop of the original size is taken; 0: no crop."""
    flip: bool = False
    """Mirror half of the images left to right."""

    @property
    def changes_inputs(self) -> bool:
        return self.crop_padding > 0 or self.flip


def check_augment(params: AugmentParams, spec: InputSpec) -> None:
    """Refuses augmentation of feature vectors.

    Raises:
        ConfigError: asked for on inputs that are not images.
    """
    if params.changes_inputs and spec.kind != "image":
        raise ConfigError(
            "data.augment: crop_padding and flip are for images, but this data set holds feature vectors; "
            "set data.augment.crop_padding=0 and data.augment.flip=false."
        )


def augment(inputs: np.ndarray, sample_ids: np.ndarray, view: int, seed: int, params: AugmentParams) -> np.ndarray:
    """Crops and flips each image as its sample id, the view and the seed say.

    Args:
        inputs: uint8 (B, C, H, W).
        sample_ids: (B,) int64.
        view: number of the view.
        seed: of the run.
        params: what to do.

    Returns:
        uint8 (B, C, H, W); ``inputs`` itself when there is nothing to do.

    Raises:
        ConfigError: ``inputs`` are feature vectors and there is something to do.
    """
    if not params.changes_inputs:
        return inputs
    if inputs.ndim != 4:
        check_augment(params, InputSpec("features", inputs.shape[1:], ()))
    keys = _sample_keys(sample_ids, view, seed)
    outputs = _crop(inputs, keys, params.crop_padding) if params.crop_padding else inputs.copy()
    if params.flip:
        flipped = np.flatnonzero(_draw(keys, 2, 2))
        outputs[flipped] = outputs[flipped, :, :, ::-1]
    return outputs


def _crop(inputs: np.ndarray, keys: np.ndarray, padding: int) -> np.ndarray:
    num_rows, channels, height, width = inputs.shape
    padded = np.zeros((num_rows, channels, height + 2 * padding, width + 2 * padding), np.uint8)
    padded[:, :, padding:-padding, padding:-padding] = inputs
    tops, lefts = _draw(keys, 0, 2 * padding + 1).tolist(), _draw(keys, 1, 2 * padding + 1).tolist()
    crops: np.ndarray = np.empty_like(inputs)
    # One slice an image copies whole lines: faster than one gather over the batch.
    for row, (top, left) in enumerate(zip(tops, lefts, strict=True)):
        crops[row] = padded[row, :, top : top + height, left : left + width]
    return crops


_GAMMA = np.uint64(0x9E3779B97F4A7C15)


def _mix(values: np.ndarray) -> np.ndarray:
    """The output function of splitmix64 (Steele, Lea, Flood, OOPSLA 2014): uint64 to well-mixed uint64."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = values ^ (values >> np.uint64(31))
    return mixed


def _sample_keys(sample_ids: np.ndarray, view: int, seed: int) -> np.ndarray:
    """(B,) uint64: one key a sample, from which its random numbers are counted off."""
    # Arrays throughout: they wrap around in silence, as is meant here, where NumPy's scalars warn.
    key = np.zeros(1, np.uint64)
    for number in (np.array([seed], np.uint64), np.array([view], np.uint64), sample_ids.astype(np.uint64)):
        key = _mix((key ^ number) + _GAMMA)
    return key


def _draw(keys: np.ndarray, number: int, below: int) -> np.ndarray:
    """(B,) int64 in [0, below): random number ``number`` of each key. The bias of the remainder is below 2**-50."""
    counter = np.array([number + 1], np.uint64)
    return (_mix(keys + counter * _GAMMA) % np.uint64(below)).astype(np.int64)
