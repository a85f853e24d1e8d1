"""Random numbers as a pure function of (seed, view, sample id), counted off by what they are for.

So pixels do not depend on the block a sample comes in, on the process that decodes it, or on how often the run was
restarted, and asking for one more operation changes nothing about what the others draw.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np


class Number(IntEnum):
    """Which of a sample's random numbers is for what. Part of the contract: cached logits belong to these pixels."""

    CROP_TOP = 0
    CROP_LEFT = 1
    FLIP = 2
    BRIGHTNESS = 3
    CONTRAST = 4
    SATURATION = 5
    PARTNER = 6
    MIX_WEIGHT = 7
    MIX_KIND = 8
    CUT_ROW = 9
    CUT_COLUMN = 10
    BOX = 100  # four for each of the ten tries: area, ratio, top, left
    RANDAUGMENT = 200  # two for each operation, of which there may be any number: which one, and its sign


_GAMMA = np.uint64(0x9E3779B97F4A7C15)


def _mix(values: np.ndarray) -> np.ndarray:
    """The output function of splitmix64 (Steele, Lea, Flood, OOPSLA 2014): uint64 to well-mixed uint64."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = values ^ (values >> np.uint64(31))
    return mixed


def sample_keys(sample_ids: np.ndarray, view: int, seed: int) -> np.ndarray:
    """(B,) uint64: one key a sample, from which its random numbers are counted off."""
    # Arrays throughout: they wrap around in silence, as is meant here, where NumPy's scalars warn.
    key = np.zeros(1, np.uint64)
    for number in (np.array([seed], np.uint64), np.array([view], np.uint64), sample_ids.astype(np.uint64)):
        key = _mix((key ^ number) + _GAMMA)
    return key


def _bits(keys: np.ndarray, number: int) -> np.ndarray:
    counter = np.array([number + 1], np.uint64)
    return _mix(keys + counter * _GAMMA)


def draw(keys: np.ndarray, number: int, below: int | np.ndarray) -> np.ndarray:
    """(B,) int64 in [0, below): random number ``number`` of each key.

    Args:
        keys: (B,) uint64 of ``sample_keys``.
        number: see ``Number``.
        below: at least 1; one for all, or (B,). Up to 2**14 the bias of the remainder is below 2**-50.
    """
    return (_bits(keys, number) % np.asarray(below, np.uint64)).astype(np.int64)


def draw_uniform(keys: np.ndarray, number: int) -> np.ndarray:
    """(B,) float64 in [0, 1): random number ``number`` of each key, in steps of 2**-53."""
    return (_bits(keys, number) >> np.uint64(11)).astype(np.float64) * 2.0**-53
