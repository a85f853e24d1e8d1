"""Reliability: how often a classifier is right where it claims a confidence."""

from __future__ import annotations

import numpy as np

from pipeline.registry import Params

NUM_BINS = 15


class ReliabilityCurve(Params):
    """Confidence and accuracy in equal bins of the top-1 confidence, empty bins left out."""

    name: str
    num_rows: tuple[int, ...]
    confidence: tuple[float, ...]
    """Mean of each bin."""
    accuracy: tuple[float, ...]
    ece: float
    """Expected calibration error: mean distance of the two over the rows."""


def reliability_curve(name: str, probabilities: np.ndarray, labels: np.ndarray) -> ReliabilityCurve:
    """The curve of (N, C) probabilities; bins are (low, high], ties between classes go to the lowest number."""
    confidence = probabilities.max(axis=1)
    correct = probabilities.argmax(axis=1) == labels
    bins = np.clip(np.ceil(confidence * NUM_BINS).astype(int) - 1, 0, NUM_BINS - 1)
    rows, claimed, right = (
        np.bincount(bins, weights=weights, minlength=NUM_BINS) for weights in (None, confidence, correct)
    )
    filled = rows > 0
    return ReliabilityCurve(
        name=name,
        num_rows=tuple(int(count) for count in rows[filled]),
        confidence=tuple((claimed[filled] / rows[filled]).tolist()),
        accuracy=tuple((right[filled] / rows[filled]).tolist()),
        ece=float(np.abs(claimed - right).sum() / len(labels)),
    )
