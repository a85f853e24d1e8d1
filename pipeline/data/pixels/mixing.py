"""Mixup and cutmix: an image mixed with a partner of its split, as a pure function of (seed, view, sample id).

Both images come into the mix as the view shows them, so the partner's pixels are those it has as a sample of its own.
"""

from __future__ import annotations

import numpy as np

from pipeline.data.order.rows import RowGroups, RowSet
from pipeline.data.pixels.augment import AugmentParams
from pipeline.data.pixels.draws import Number, draw, draw_uniform, sample_keys
from pipeline.data.sources.source import positions_of

# Weights are multiples of this: last bits, in which versions of SciPy differ, do not reach the pixels, and a weighted
# sum of two of them has 24 bits, so it is exact in float32 and rounds the same everywhere.
_WEIGHT_STEP = 2.0**-16


def draw_partners(sample_ids: np.ndarray, view: int, seed: int, rows: RowSet, groups: RowGroups | None) -> np.ndarray:
    """Which sample each one is mixed with: another of its row group, drawn uniformly.

    From the same row group, because that is in memory whenever the sample is.

    Args:
        sample_ids: (B,) int64, of the split.
        view: number of the view.
        seed: of the run.
        rows: of the split.
        groups: of the split's files; none: the whole split is one group.

    Returns:
        (B,) int64; the sample itself where its group holds no other row of the split.

    Raises:
        DataError: a sample is not of the split.
    """
    positions = positions_of(sample_ids, rows.ids)
    bounds = np.array([0, rows.num_rows]) if groups is None else groups.bounds(rows)
    own = np.searchsorted(bounds, positions, side="right") - 1
    starts, sizes = bounds[own], bounds[own + 1] - bounds[own]
    others = draw(sample_keys(sample_ids, view, seed), Number.PARTNER, np.maximum(sizes - 1, 1))
    partners: np.ndarray = rows.ids[starts + (positions - starts + 1 + others) % sizes]
    return partners


def mix(
    inputs: np.ndarray, partner_inputs: np.ndarray, sample_ids: np.ndarray, view: int, seed: int, params: AugmentParams
) -> tuple[np.ndarray, np.ndarray]:
    """Mixes each image with its partner.

    Mixup (arXiv 1710.09412): ``w * image + (1 - w) * partner``, rounded half to even, with w from Beta(mixup, mixup).
    Cutmix (arXiv 1905.04899): the partner's pixels within a box whose sides are sqrt(1 - w) of the image's, w from
    Beta(cutmix, cutmix), around a point drawn uniformly; what the image cuts off the box is added to w.

    Args:
        inputs: uint8 (B, C, H, W).
        partner_inputs: uint8 (B, C, H, W).
        sample_ids: (B,) int64, of ``inputs``.
        view: number of the view.
        seed: of the run.
        params: with mixup, cutmix or both; with both, each sample takes one of them by a fair draw.

    Returns:
        uint8 (B, C, H, W), and float32 (B,): the weight of the sample's own label, 0 to 1.
    """
    keys = sample_keys(sample_ids, view, seed)
    both = params.mixup > 0 and params.cutmix > 0
    cuts = draw(keys, Number.MIX_KIND, 2) == 1 if both else np.full(len(keys), params.cutmix > 0)
    weights = _draw_weights(keys, np.where(cuts, params.cutmix, params.mixup))
    outputs = inputs.copy()
    # An image at a time: in float32 a whole batch of large ones would take four times its size, twice.
    for row in np.flatnonzero(~cuts):
        own, other = inputs[row].astype(np.float32), partner_inputs[row].astype(np.float32)
        own *= weights[row]
        other *= 1 - weights[row]
        own += other
        outputs[row] = np.rint(own, out=own)
    if cuts.any():
        height, width = inputs.shape[2:]
        boxes = _draw_cuts(keys, weights, height, width)
        for row in np.flatnonzero(cuts):
            top, bottom, left, right = boxes[row].tolist()
            outputs[row, :, top:bottom, left:right] = partner_inputs[row, :, top:bottom, left:right]
            weights[row] = 1 - (bottom - top) * (right - left) / (height * width)
    return outputs, weights


def _draw_weights(keys: np.ndarray, concentrations: np.ndarray) -> np.ndarray:
    """(B,) float32 of Beta(c, c) by the inverse of its distribution function, one c a key."""
    from scipy.special import betaincinv  # 20 MB that only a run with mixed images needs

    drawn = betaincinv(concentrations, concentrations, draw_uniform(keys, Number.MIX_WEIGHT))
    weights: np.ndarray = (np.rint(drawn / _WEIGHT_STEP) * _WEIGHT_STEP).astype(np.float32)
    return weights


def _draw_cuts(keys: np.ndarray, weights: np.ndarray, height: int, width: int) -> np.ndarray:
    """(B, 4) int64: top, bottom, left, right of each box, within the image; it may be empty."""
    sides = []
    half_shares = np.sqrt(1 - weights.astype(np.float64)) / 2
    for number, length in ((Number.CUT_ROW, height), (Number.CUT_COLUMN, width)):
        centres, halves = draw(keys, number, length), (half_shares * length).astype(np.int64)
        sides += [np.maximum(centres - halves, 0), np.minimum(centres + halves, length)]
    return np.stack(sides, axis=1)
