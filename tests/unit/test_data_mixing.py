"""Mixup and cutmix: partners out of the same row group, exact weights, and pixels that are really mixed so."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import betainc

from pipeline.data import AugmentParams, RowGroups, RowSet
from pipeline.data.order.rows import carve
from pipeline.data.pixels.mixing import draw_partners, mix
from pipeline.errors import DataError

MIXUP = AugmentParams(mixup=0.2)
CUTMIX = AugmentParams(cutmix=1.0)
BOTH = AugmentParams(mixup=0.2, cutmix=1.0)


def make_groups(sizes: list[int]) -> RowGroups:
    first = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    zeros = np.zeros(len(sizes), np.int64)
    return RowGroups(zeros, np.arange(len(sizes)), first, np.array(sizes), zeros)


def make_images(num_rows: int, seed: int, shape: tuple[int, int, int] = (3, 12, 10)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (num_rows, *shape), dtype=np.uint8)


# --- partners ---------------------------------------------------------------------------------------------------


def test_partners_are_other_rows_uniformly_drawn() -> None:
    rows = RowSet.whole(6)
    counts = np.zeros((6, 6), int)
    for view in range(3000):
        counts[np.arange(6), draw_partners(rows.ids, view, 3, rows, None)] += 1
    assert (np.diag(counts) == 0).all()
    others = counts[~np.eye(6, dtype=bool)]
    assert abs(others - 600).max() < 5 * (3000 * 0.2 * 0.8) ** 0.5


def test_partners_are_of_the_same_split_and_row_group() -> None:
    groups = make_groups([50, 1, 30, 19])
    train = carve(100, {"validation": 0.3}, seed=1)["train"]
    partners = draw_partners(train.ids, 0, 0, train, groups)
    assert np.isin(partners, train.ids).all()
    ends = groups.first_row + groups.num_rows

    def group_of(ids: np.ndarray) -> np.ndarray:
        return np.searchsorted(ends, ids, side="right")

    np.testing.assert_array_equal(group_of(partners), group_of(train.ids))
    sizes = np.bincount(group_of(train.ids), minlength=4)
    assert 0 < sizes[2] < 30  # groups have lost rows to validation, and so has the first
    lonely = sizes[group_of(train.ids)] == 1
    np.testing.assert_array_equal(partners == train.ids, lonely)


def test_the_only_row_of_a_group_is_its_own_partner() -> None:
    rows, groups = RowSet.whole(5), make_groups([2, 1, 2])
    assert draw_partners(rows.ids, 0, 0, rows, groups).tolist() == [1, 0, 2, 4, 3]


def test_a_partner_depends_on_sample_view_and_seed_alone() -> None:
    rows, groups = RowSet.whole(1000), make_groups([400, 600])
    ids = np.random.default_rng(0).permutation(1000)
    partners = draw_partners(rows.ids, 2, 7, rows, groups)
    np.testing.assert_array_equal(draw_partners(ids, 2, 7, rows, groups), partners[ids])
    for view, seed in ((3, 7), (2, 8)):
        assert (draw_partners(rows.ids, view, seed, rows, groups) != partners).mean() > 0.9


def test_partner_of_a_row_of_another_split_is_an_error() -> None:
    splits = carve(100, {"validation": 0.3}, seed=1)
    with pytest.raises(DataError, match="is not one of the 70 rows of this split"):
        draw_partners(splits["validation"].ids, 0, 0, splits["train"], None)


# --- weights and pixels -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("concentration", [0.2, 1.0, 8.0])
def test_mixup_weights_follow_the_beta_distribution(concentration: float) -> None:
    images = np.zeros((4000, 1, 1, 1), np.uint8)
    _, weights = mix(images, images, np.arange(4000), 0, 0, AugmentParams(mixup=concentration))
    assert weights.dtype == np.float32
    for bound in np.linspace(0.001, 0.999, 50):
        assert abs((weights <= bound).mean() - betainc(concentration, concentration, bound)) < 2.5 / 4000**0.5


@pytest.mark.parametrize("concentration", [1e-9, 1e-3, 1e3, 1e9])
def test_weights_are_shares_at_any_concentration(concentration: float) -> None:
    images = np.zeros((2000, 1, 2, 2), np.uint8)
    for params in (AugmentParams(mixup=concentration), AugmentParams(cutmix=concentration)):
        _, weights = mix(images, images, np.arange(2000), 0, 0, params)
        assert np.isfinite(weights).all()
        assert ((weights >= 0) & (weights <= 1)).all()


def test_mixup_is_the_weighted_sum_rounded_half_to_even() -> None:
    images, partners = make_images(200, 0), make_images(200, 1)
    mixed, weights = mix(images, partners, np.arange(200), 0, 0, MIXUP)
    shares = weights.astype(np.float64)[:, None, None, None]
    exact = shares * images + (1 - shares) * partners
    np.testing.assert_array_equal(mixed, np.rint(exact).astype(np.uint8))


def test_cutmix_pastes_a_box_and_weighs_by_its_exact_area() -> None:
    height, width = 12, 10
    images = np.zeros((3000, 2, height, width), np.uint8)
    mixed, weights = mix(images, images + 9, np.arange(3000), 0, 0, CUTMIX)
    pasted = mixed[:, 0] == 9
    np.testing.assert_array_equal(mixed[:, 1] == 9, pasted)
    rows, columns = pasted.any(axis=2), pasted.any(axis=1)
    np.testing.assert_array_equal(pasted, rows[:, :, None] & columns[:, None, :])
    for lines in (rows, columns):  # in one piece
        assert (np.abs(np.diff(np.pad(lines, ((0, 0), (1, 1))).astype(int), axis=1)).sum(axis=1) <= 2).all()
    np.testing.assert_array_equal(weights, (1 - pasted.sum(axis=(1, 2)) / (height * width)).astype(np.float32))
    # Boxes that no edge cuts have the image's proportions, up to whole pixels.
    free = ~(rows[:, 0] | rows[:, -1] | columns[:, 0] | columns[:, -1])
    sides = rows[free].sum(axis=1) / height - columns[free].sum(axis=1) / width
    assert free.sum() > 300
    assert abs(sides).max() < 2 / height + 2 / width
    # Centres are uniform, so boxes lie as often in one half as in the other.
    middle = (rows * np.arange(height)).sum(axis=1)[free] / rows[free].sum(axis=1).clip(1)
    assert abs(middle[rows[free].any(axis=1)].mean() - (height - 1) / 2) < 0.5


def test_with_both_each_sample_takes_one_as_if_it_were_alone() -> None:
    images, partners, ids = make_images(2000, 0), make_images(2000, 1), np.arange(2000)
    mixed, weights = mix(images, partners, ids, 1, 2, BOTH)
    blended, blend_weights = mix(images, partners, ids, 1, 2, MIXUP)
    pasted, paste_weights = mix(images, partners, ids, 1, 2, CUTMIX)
    cuts = weights != blend_weights
    np.testing.assert_array_equal(weights[cuts], paste_weights[cuts])
    np.testing.assert_array_equal(mixed, np.where(cuts[:, None, None, None], pasted, blended))
    assert abs(cuts.mean() - 0.5) < 0.07


@pytest.mark.parametrize("params", [MIXUP, CUTMIX, BOTH])
def test_a_mix_depends_on_sample_view_and_seed_alone(params: AugmentParams) -> None:
    images, partners, ids = make_images(100, 0), make_images(100, 1), np.arange(100) * 11
    images.flags.writeable = partners.flags.writeable = False  # as arrays out of shared memory are
    mixed, weights = mix(images, partners, ids, 4, 5, params)
    order = np.random.default_rng(2).permutation(100)
    shuffled, shuffled_weights = mix(images[order], partners[order], ids[order], 4, 5, params)
    np.testing.assert_array_equal(shuffled, mixed[order])
    np.testing.assert_array_equal(shuffled_weights, weights[order])
    for view, seed in ((0, 5), (4, 0)):
        assert (mix(images, partners, ids, view, seed, params)[1] != weights).mean() > 0.7


def test_an_image_mixed_with_itself_stays_as_it_is() -> None:
    images = make_images(100, 0)
    np.testing.assert_array_equal(mix(images, images, np.arange(100), 0, 0, BOTH)[0], images)


def test_partners_and_mixes_are_golden() -> None:
    # Part of the contract: cached logits belong to these pixels.
    ids, rows = np.arange(6), RowSet.whole(1000)
    assert draw_partners(ids, 2, 42, rows, None).tolist() == [949, 812, 490, 379, 183, 666]
    images = np.zeros((6, 1, 8, 8), np.uint8)
    mixed, weights = mix(images, images + 200, ids, 2, 42, BOTH)
    assert mixed.sum(axis=(1, 2, 3)).tolist() == [2400, 64, 800, 192, 6000, 1600]
    # Boxes of 12, 4, 30 and 8 of the 64 pixels, and two weighted sums.
    assert weights.tolist() == [0.8125, 0.9928741455078125, 0.9375, 0.983062744140625, 0.53125, 0.875]
