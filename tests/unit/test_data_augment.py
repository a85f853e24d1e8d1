"""Augmentation: pure in (seed, view, sample id), and really done."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.data import AugmentParams, augment
from pipeline.data.augment import _draw
from pipeline.errors import ConfigError

BOTH = AugmentParams(crop_padding=2, flip=True)


def make_images(num_rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 256, (num_rows, 3, 6, 5), dtype=np.uint8)


def test_nothing_to_do_returns_the_same_array() -> None:
    images = make_images(4)
    assert augment(images, np.arange(4), 0, 0, AugmentParams()) is images


def test_inputs_are_left_alone() -> None:
    images = make_images(64)
    images.flags.writeable = False  # as arrays out of shared memory are
    before = images.copy()
    for params in (BOTH, AugmentParams(flip=True), AugmentParams(crop_padding=1)):
        augmented = augment(images, np.arange(64), 0, 0, params)
        assert augmented.shape == images.shape
        assert augmented.dtype == np.uint8
        assert augmented.flags.c_contiguous
    np.testing.assert_array_equal(images, before)


def test_a_sample_does_not_depend_on_its_block() -> None:
    images, ids = make_images(200), np.arange(200) * 7
    whole = augment(images, ids, 3, 11, BOTH)
    order = np.random.default_rng(1).permutation(200)
    np.testing.assert_array_equal(augment(images[order], ids[order], 3, 11, BOTH), whole[order])
    for row in (0, 57, 199):
        alone = augment(images[row : row + 1], ids[row : row + 1], 3, 11, BOTH)
        np.testing.assert_array_equal(alone[0], whole[row])


@pytest.mark.parametrize(("view", "seed"), [(1, 0), (0, 1)])
def test_view_and_seed_change_the_pixels(view: int, seed: int) -> None:
    images, ids = make_images(200), np.arange(200)
    first, other = augment(images, ids, 0, 0, BOTH), augment(images, ids, view, seed, BOTH)
    assert (first != other).any(axis=(1, 2, 3)).mean() > 0.9


def test_view_and_sample_id_are_not_interchangeable() -> None:
    images = np.repeat(make_images(1), 50, axis=0)
    draws = [augment(images, np.arange(50), view, 0, BOTH) for view in range(2)]
    assert not np.array_equal(draws[0][1:], draws[1][:-1])


def test_flips_mirror_half_of_the_images() -> None:
    images = make_images(4000)
    flipped = augment(images, np.arange(4000), 0, 0, AugmentParams(flip=True))
    mirrored = (flipped == images[..., ::-1]).all(axis=(1, 2, 3))
    same = (flipped == images).all(axis=(1, 2, 3))
    assert (mirrored ^ same).all()
    assert abs(mirrored.mean() - 0.5) < 0.04  # five standard deviations


def test_crops_are_shifted_images_with_zeros_around_uniformly_drawn() -> None:
    num_rows, padding = 5000, 1
    images = make_images(num_rows)
    cropped = augment(images, np.arange(num_rows), 0, 0, AugmentParams(crop_padding=padding))
    padded = np.pad(images, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    counts = []
    for top in range(3):
        for left in range(3):
            candidate = padded[:, :, top : top + 6, left : left + 5]
            counts.append(int((cropped == candidate).all(axis=(1, 2, 3)).sum()))
    assert sum(counts) == num_rows
    expected = num_rows / 9
    assert max(abs(count - expected) for count in counts) < 5 * (expected * 8 / 9) ** 0.5


def test_crop_and_flip_are_independent() -> None:
    images = np.zeros((4000, 1, 3, 3), np.uint8)
    images[:, 0, 1, 1], images[:, 0, 1, 2] = 100, 200
    out = augment(images, np.arange(4000), 0, 0, AugmentParams(crop_padding=1, flip=True))
    above = (out[:, 0, 0] == 100).any(axis=1)  # shifted upwards
    middle = np.argwhere(out[:, 0] == 100)
    flips = np.array([out[row, 0, y, x - 1] == 200 for row, y, x in middle if x > 0])
    assert abs(above.mean() - 1 / 3) < 0.04
    assert 0.3 < flips.mean() < 0.7


def test_augmented_pixels_are_golden() -> None:
    # Part of the contract: cached logits belong to these pixels.
    images = np.arange(2 * 9, dtype=np.uint8).reshape(2, 1, 3, 3)
    out = augment(images, np.array([5, 10**10]), 2, 42, AugmentParams(crop_padding=1, flip=True))
    # Down by one, then mirrored; down by one only.
    assert out.tolist() == [[[[0, 0, 0], [2, 1, 0], [5, 4, 3]]], [[[0, 0, 0], [9, 10, 11], [12, 13, 14]]]]


def test_random_numbers_are_those_of_splitmix64() -> None:
    # The first two outputs for seed 1234567, as other implementations give them.
    state = np.array([1234567], np.uint64)
    assert _draw(state, 0, 2**62)[0] == 6457827717110365317 % 2**62
    assert _draw(state, 1, 2**62)[0] == 3203168211198807973 % 2**62


@pytest.mark.parametrize("seed", [0, 2**63, 2**64 - 1])
def test_large_seeds_and_ids_do_not_overflow(seed: int) -> None:
    augment(make_images(2), np.array([0, 2**62]), 2**31 - 1, seed, BOTH)


def test_features_cannot_be_augmented() -> None:
    features = np.zeros((2, 5), np.float32)
    assert augment(features, np.arange(2), 0, 0, AugmentParams()) is features
    with pytest.raises(ConfigError, match="crop_padding and flip are for images"):
        augment(features, np.arange(2), 0, 0, BOTH)
