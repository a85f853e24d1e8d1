"""Augmentation: pure in (seed, view, sample id), and really done."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from pipeline.contracts.columns import InputSpec
from pipeline.data import AugmentParams, augment
from pipeline.data.pixels.augment import check_augment
from pipeline.data.pixels.draws import Number, draw, draw_uniform
from pipeline.errors import ConfigError

BOTH = AugmentParams(crop_padding=2, flip=True)
RECOLORED = AugmentParams(brightness=0.4, contrast=0.4, saturation=0.4, randaugment=2)
ALL = RECOLORED.model_copy(update={"crop_padding": 2, "flip": True})


def make_images(num_rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 256, (num_rows, 3, 6, 5), dtype=np.uint8)


def test_nothing_to_do_returns_the_same_array() -> None:
    images = make_images(4)
    assert augment(images, np.arange(4), 0, 0, AugmentParams()) is images


def test_inputs_are_left_alone() -> None:
    images = make_images(64)
    images.flags.writeable = False  # as arrays out of shared memory are
    before = images.copy()
    for params in (BOTH, AugmentParams(flip=True), AugmentParams(crop_padding=1), RECOLORED, ALL):
        augmented = augment(images, np.arange(64), 0, 0, params)
        assert augmented.shape == images.shape
        assert augmented.dtype == np.uint8
        assert augmented.flags.c_contiguous
    np.testing.assert_array_equal(images, before)


@pytest.mark.parametrize("params", [BOTH, ALL])
def test_a_sample_does_not_depend_on_its_block(params: AugmentParams) -> None:
    images, ids = make_images(200), np.arange(200) * 7
    whole = augment(images, ids, 3, 11, params)
    order = np.random.default_rng(1).permutation(200)
    np.testing.assert_array_equal(augment(images[order], ids[order], 3, 11, params), whole[order])
    for row in (0, 57, 199):
        alone = augment(images[row : row + 1], ids[row : row + 1], 3, 11, params)
        np.testing.assert_array_equal(alone[0], whole[row])


@pytest.mark.parametrize("params", [BOTH, RECOLORED])
@pytest.mark.parametrize(("view", "seed"), [(1, 0), (0, 1)])
def test_view_and_seed_change_the_pixels(view: int, seed: int, params: AugmentParams) -> None:
    images, ids = make_images(200), np.arange(200)
    first, other = augment(images, ids, 0, 0, params), augment(images, ids, view, seed, params)
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


def test_what_one_operation_draws_does_not_depend_on_the_others() -> None:
    images, ids = make_images(100), np.arange(100)
    one_by_one = images
    for name in ("crop_padding", "flip", "brightness", "contrast", "saturation", "randaugment"):
        one_by_one = augment(one_by_one, ids, 0, 0, AugmentParams(**{name: getattr(ALL, name)}))
    np.testing.assert_array_equal(augment(images, ids, 0, 0, ALL), one_by_one)


def test_each_random_number_has_one_use() -> None:
    assert Number.BOX + 4 * 10 <= Number.RANDAUGMENT
    assert max(number for number in Number if number not in (Number.BOX, Number.RANDAUGMENT)) < Number.BOX


@pytest.mark.parametrize("channels", [1, 3])
def test_recoloured_images_keep_their_channels(channels: int) -> None:
    images = make_images(50)[:, :channels]
    recoloured = augment(images, np.arange(50), 0, 0, RECOLORED)
    assert recoloured.shape == images.shape
    assert (recoloured != images).any(axis=(1, 2, 3)).mean() > 0.9


def test_grey_images_have_no_saturation() -> None:
    images = make_images(50)[:, :1]
    np.testing.assert_array_equal(augment(images, np.arange(50), 0, 0, AugmentParams(saturation=0.9)), images)


def test_augmented_pixels_are_golden() -> None:
    # Part of the contract: cached logits belong to these pixels.
    images = np.arange(2 * 9, dtype=np.uint8).reshape(2, 1, 3, 3)
    out = augment(images, np.array([5, 10**10]), 2, 42, AugmentParams(crop_padding=1, flip=True))
    # Down by one, then mirrored; down by one only.
    assert out.tolist() == [[[[0, 0, 0], [2, 1, 0], [5, 4, 3]]], [[[0, 0, 0], [9, 10, 11], [12, 13, 14]]]]


def test_random_numbers_are_those_of_splitmix64() -> None:
    # The first two outputs for seed 1234567, as other implementations give them.
    state = np.array([1234567], np.uint64)
    assert draw(state, 0, 2**62)[0] == 6457827717110365317 % 2**62
    assert draw(state, 1, 2**62)[0] == 3203168211198807973 % 2**62
    assert draw(state, 1, np.array([1000]))[0] == 3203168211198807973 % 1000
    assert draw_uniform(state, 0)[0] == (6457827717110365317 >> 11) / 2**53


@pytest.mark.parametrize("seed", [0, 2**63, 2**64 - 1])
def test_large_seeds_and_ids_do_not_overflow(seed: int) -> None:
    augment(make_images(2), np.array([0, 2**62]), 2**31 - 1, seed, ALL)


def test_features_cannot_be_augmented() -> None:
    features = np.zeros((2, 5), np.float32)
    assert augment(features, np.arange(2), 0, 0, AugmentParams()) is features
    with pytest.raises(ConfigError, match="crop_padding and flip are for images"):
        augment(features, np.arange(2), 0, 0, BOTH)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"flip": True}, r"flip is for images, .* holds feature vectors; set data\.augment\.flip=false\.$"),
        (
            {"random_resized_crop": (0.2, 1.0), "mixup": 0.2, "randaugment_magnitude": 5},
            "random_resized_crop and mixup are for images, .* set data.augment.random_resized_crop=null "
            "data.augment.mixup=0.0",
        ),
    ],
)
def test_what_is_for_images_is_refused_for_features(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_augment(AugmentParams(**values), InputSpec("features", (5,), ("a", "b")))


def test_colours_of_images_without_colour_are_refused() -> None:
    spec = InputSpec("image", (4, 8, 8), ("a", "b"))
    check_augment(AugmentParams(crop_padding=1, flip=True, random_resized_crop=None, mixup=1.0), spec)
    with pytest.raises(ConfigError, match=r"contrast and randaugment are for grey or RGB images, .* images of 4 chan"):
        check_augment(AugmentParams(contrast=0.1, randaugment=1), spec)
    with pytest.raises(ConfigError, match="images of 4 channels"):
        augment(np.zeros((2, 4, 8, 8), np.uint8), np.arange(2), 0, 0, RECOLORED)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"crop_padding": 4, "random_resized_crop": (0.2, 1.0)},
            r"two ways to crop; set crop_padding=0 or random_resized_crop=null",
        ),
        ({"random_resized_crop": (0.5, 0.2)}, r"expected 0 < smallest <= largest <= 1, got \[0.5, 0.2\]"),
        ({"random_resized_crop": (0.0, 1.0)}, "expected 0 < smallest"),
        ({"random_resized_crop": (0.5, 1.5)}, "expected 0 < smallest"),
        ({"randaugment_magnitude": 31}, "less than or equal to 30"),
        ({"randaugment": -1}, "greater than or equal to 0"),
        ({"mixup": float("inf")}, "finite"),
        ({"cutmix": -0.1}, "greater than or equal to 0"),
        ({"brightness": float("nan")}, "greater than or equal to 0|finite"),
    ],
)
def test_parameters_without_meaning_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        AugmentParams(**values)
