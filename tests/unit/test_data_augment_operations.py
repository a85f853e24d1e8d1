"""RandAugment and colour jitter against torchvision's on the same images; random resized crops."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop, v2
from torchvision.transforms.v2 import functional

from pipeline.data import AugmentParams, augment
from pipeline.data.pixels.augment import draw_boxes
from pipeline.data.pixels.draws import sample_keys
from pipeline.data.pixels.randaugment import (
    BRIGHTNESS,
    CONTRAST,
    OPERATIONS,
    SATURATION,
    apply_changes,
    draw_operations,
)

HEIGHT, WIDTH = 24, 20
IDS = np.arange(2000)

REFERENCES: dict[str, Callable[[Any, float], Any]] = {
    "Identity": lambda image, amount: image,
    "ShearX": lambda image, amount: functional.affine(
        image, angle=0.0, translate=[0, 0], scale=1.0, shear=[math.degrees(math.atan(amount)), 0.0], center=[0, 0]
    ),
    "ShearY": lambda image, amount: functional.affine(
        image, angle=0.0, translate=[0, 0], scale=1.0, shear=[0.0, math.degrees(math.atan(amount))], center=[0, 0]
    ),
    "TranslateX": lambda image, amount: functional.affine(
        image, angle=0.0, translate=[int(amount), 0], scale=1.0, shear=[0.0, 0.0]
    ),
    "TranslateY": lambda image, amount: functional.affine(
        image, angle=0.0, translate=[0, int(amount)], scale=1.0, shear=[0.0, 0.0]
    ),
    "Rotate": functional.rotate,
    "Brightness": lambda image, amount: functional.adjust_brightness(image, 1 + amount),
    "Color": lambda image, amount: functional.adjust_saturation(image, 1 + amount),
    "Contrast": lambda image, amount: functional.adjust_contrast(image, 1 + amount),
    "Sharpness": lambda image, amount: functional.adjust_sharpness(image, 1 + amount),
    "Posterize": lambda image, amount: functional.posterize(image, 8 - round(amount)),
    "Solarize": lambda image, amount: functional.solarize(image, 255 - amount),
    "AutoContrast": lambda image, amount: functional.autocontrast(image),
    "Equalize": lambda image, amount: functional.equalize(image),
}


def make_pixels(channels: int, seed: int = 0) -> np.ndarray:
    """Smooth enough for an operation to leave a pattern, and of less than the full range of values."""
    noise = np.random.default_rng(seed).integers(0, 60, (channels, HEIGHT, WIDTH))
    slope = np.add.outer(np.arange(HEIGHT) * 4, np.arange(WIDTH) * 3)
    return (noise + slope + 10).astype(np.uint8)


def to_image(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0).copy())


# --- RandAugment ------------------------------------------------------------------------------------------------


def test_operations_are_torchvisions_in_its_order_with_its_magnitudes_and_signs() -> None:
    space = v2.RandAugment._AUGMENTATION_SPACE
    assert [operation.name for operation in OPERATIONS] == list(space)
    for operation in OPERATIONS:
        magnitudes, signed = space[operation.name]
        assert operation.signed == signed
        table = magnitudes(31, HEIGHT, WIDTH)
        ours = [operation.amount(magnitude, HEIGHT, WIDTH) for magnitude in range(31)]
        if operation.name == "Posterize":
            assert [8 - round(amount) for amount in ours] == table.tolist()
        elif operation.name == "Solarize":
            assert [1 - amount / 255 for amount in ours] == pytest.approx(table.tolist(), abs=1e-6)
        else:
            assert ours == pytest.approx([0.0] * 31 if table is None else table.tolist(), rel=1e-6)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
def test_each_operation_is_torchvisions_at_every_magnitude(operation: Any, channels: int) -> None:
    pixels = make_pixels(channels)
    changed = 0
    for magnitude in range(31):
        for sign in (1, -1) if operation.signed else (1,):
            amount = sign * operation.amount(magnitude, HEIGHT, WIDTH)
            ours = pixels[None].copy()
            apply_changes(ours, [[(operation, amount)]])
            expected = np.asarray(REFERENCES[operation.name](to_image(pixels), amount))
            np.testing.assert_array_equal(to_image(ours[0]), expected, f"magnitude {magnitude}, sign {sign}")
            changed += not np.array_equal(ours[0], pixels)
    nothing = operation.name == "Identity" or (operation.name == "Color" and channels == 1)
    assert (changed == 0) == nothing


def test_operations_are_drawn_uniformly_with_either_sign() -> None:
    keys = sample_keys(IDS, 0, 0)
    changes = draw_operations(keys, 2, 9, HEIGHT, WIDTH)
    for step in range(2):
        counts = Counter(todo[step][0].name for todo in changes)
        assert counts.keys() == REFERENCES.keys()
        assert max(abs(count - 2000 / 14) for count in counts.values()) < 5 * (2000 / 14) ** 0.5
    amounts = [amount for todo in changes for operation, amount in todo if operation.signed]
    assert abs(np.mean(np.array(amounts) < 0) - 0.5) < 0.05
    assert all(amount >= 0 for todo in changes for operation, amount in todo if not operation.signed)
    pairs = Counter((todo[0][0].name, todo[1][0].name) for todo in changes)
    assert len(pairs) == 14 * 14  # with repetition, and independently of each other


def test_a_further_operation_leaves_those_before_it() -> None:
    keys = sample_keys(IDS[:50], 1, 2)
    one, three = draw_operations(keys, 1, 9, HEIGHT, WIDTH), draw_operations(keys, 3, 9, HEIGHT, WIDTH)
    assert [todo[:1] for todo in three] == one


# --- colour jitter ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("operation", "reference"),
    [
        (BRIGHTNESS, functional.adjust_brightness),
        (CONTRAST, functional.adjust_contrast),
        (SATURATION, functional.adjust_saturation),
    ],
)
def test_jitter_is_torchvisions_at_any_factor(operation: Any, reference: Callable[..., Any], channels: int) -> None:
    pixels = make_pixels(channels)
    for factor in (0.0, 0.3, 1.0, 1.75, 3.0):
        ours = pixels[None].copy()
        apply_changes(ours, [[(operation, factor - 1)]])
        np.testing.assert_array_equal(to_image(ours[0]), np.asarray(reference(to_image(pixels), factor)))


@pytest.mark.parametrize("extent", [0.4, 2.0])
def test_factors_are_uniform_between_torchvisions_bounds(extent: float) -> None:
    images = np.full((2000, 1, 1, 1), 80, np.uint8)
    factors = augment(images, IDS, 0, 0, AugmentParams(brightness=extent)).ravel() / 80
    low, high = v2.ColorJitter(brightness=extent).brightness
    assert (low, high) == (max(0, 1 - extent), 1 + extent)
    assert factors.min() == pytest.approx(low, abs=0.03)
    assert factors.max() == pytest.approx(high, abs=0.03)
    assert factors.mean() == pytest.approx((low + high) / 2, abs=5 * (high - low) / (12 * 2000) ** 0.5)


def test_jitter_goes_by_brightness_contrast_saturation() -> None:
    images = np.repeat(make_pixels(3)[None], 20, axis=0)
    ids = IDS[:20]
    together = augment(images, ids, 0, 0, AugmentParams(brightness=0.5, contrast=0.6, saturation=0.7))
    one_by_one = images
    for params in (AugmentParams(brightness=0.5), AugmentParams(contrast=0.6), AugmentParams(saturation=0.7)):
        one_by_one = augment(one_by_one, ids, 0, 0, params)
    np.testing.assert_array_equal(together, one_by_one)


# --- random resized crop ----------------------------------------------------------------------------------------


def draw_sizes(sizes: list[tuple[int, int]], view: int = 0, seed: int = 0, **values: Any) -> np.ndarray:
    params = AugmentParams(**{"random_resized_crop": (0.08, 1.0), **values})
    return draw_boxes(np.array(sizes), np.arange(len(sizes)), view, seed, params)


def test_boxes_lie_within_the_image_at_the_areas_and_ratios_asked_for() -> None:
    sizes = np.random.default_rng(0).integers(200, 400, (2000, 2))
    left, top, right, bottom = draw_boxes(sizes, IDS, 0, 0, AugmentParams(random_resized_crop=(0.2, 0.4))).T
    assert (left >= 0).all()
    assert (top >= 0).all()
    assert (right <= sizes[:, 1]).all()
    assert (bottom <= sizes[:, 0]).all()
    areas = (right - left) * (bottom - top) / sizes.prod(axis=1)
    ratios = (right - left) / (bottom - top)
    assert 0.195 < areas.min() < 0.205
    assert 0.395 < areas.max() < 0.405
    assert 0.745 < ratios.min() < 0.76
    assert 1.32 < ratios.max() < 1.34
    # The area is uniform, the logarithm of the ratio too; the box is anywhere that it fits.
    assert areas.mean() == pytest.approx(0.3, abs=0.007)
    assert np.log(ratios).mean() == pytest.approx(0, abs=0.02)
    assert (left / (sizes[:, 1] - (right - left))).mean() == pytest.approx(0.5, abs=0.035)
    assert (top / (sizes[:, 0] - (bottom - top))).mean() == pytest.approx(0.5, abs=0.035)


def test_boxes_are_distributed_as_torchvisions() -> None:
    torch.manual_seed(0)
    height, width = 40, 60
    image = torch.empty(1, height, width)
    theirs = np.array([RandomResizedCrop.get_params(image, [0.3, 1.0], [3 / 4, 4 / 3]) for _ in range(2000)])
    left, top, right, bottom = draw_sizes([(height, width)] * 2000, random_resized_crop=(0.3, 1.0)).T
    ours = np.stack([top, left, bottom - top, right - left], axis=1)
    error = np.sqrt(ours.var(axis=0) / 2000 + theirs.var(axis=0) / 2000)
    assert (abs(ours.mean(axis=0) - theirs.mean(axis=0)) < 5 * error).all()
    assert ours.std(axis=0) == pytest.approx(theirs.std(axis=0), rel=0.1)


@pytest.mark.parametrize("size", [(10, 1000), (1000, 10), (1, 9), (77, 300)])
def test_boxes_of_images_that_no_try_fits_are_torchvisions(size: tuple[int, int]) -> None:
    left, top, right, bottom = draw_sizes([size], random_resized_crop=(1.0, 1.0))[0].tolist()
    expected = RandomResizedCrop.get_params(torch.empty(1, *size), [1.0, 1.0], [3 / 4, 4 / 3])
    assert (top, left, bottom - top, right - left) == expected


def test_a_box_depends_on_sample_view_and_seed_alone() -> None:
    sizes = np.random.default_rng(0).integers(30, 60, (200, 2))
    params = AugmentParams(random_resized_crop=(0.08, 1.0))
    boxes = draw_boxes(sizes, IDS[:200], 3, 4, params)
    order = np.random.default_rng(1).permutation(200)
    np.testing.assert_array_equal(draw_boxes(sizes[order], IDS[:200][order], 3, 4, params), boxes[order])
    for view, seed in ((0, 4), (3, 0)):
        assert (draw_boxes(sizes, IDS[:200], view, seed, params) != boxes).any(axis=1).mean() > 0.9


# --- golden -----------------------------------------------------------------------------------------------------


def test_recoloured_pixels_and_boxes_are_golden() -> None:
    # Part of the contract: cached logits belong to these pixels.
    keys = sample_keys(np.array([0, 1, 2, 10**10]), 2, 42)
    changes = draw_operations(keys, 2, 9, HEIGHT, WIDTH)
    assert [[(operation.name, round(amount, 4)) for operation, amount in todo] for todo in changes] == [
        [("Identity", 0.0), ("Color", -0.27)],
        [("Brightness", -0.27), ("TranslateX", 2.719)],
        [("ShearY", 0.09), ("Sharpness", 0.27)],
        [("Color", 0.27), ("Rotate", 9.0)],
    ]
    images = np.repeat(np.arange(30, 240, 30, dtype=np.uint8)[None, None, None], 2, axis=0)
    jittered = augment(images, np.array([5, 10**10]), 2, 42, AugmentParams(brightness=0.4, contrast=0.4))
    assert jittered[:, 0, 0].tolist() == [[0, 29, 60, 92, 123, 154, 185], [30, 50, 71, 92, 112, 133, 153]]
    assert draw_sizes([(40, 60)] * 3, 2, 42).tolist() == [[13, 6, 52, 38], [3, 0, 39, 37], [34, 7, 59, 31]]
