"""Temperature scaling: one number that corrects a classifier's confidence."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

from pipeline.evaluation.proxy_teacher import log_probabilities

Criterion = Literal["brier", "nll"]

_BOUNDS = (math.log(0.05), math.log(20.0))
_NUM_STARTS = 13


def fit_temperature(logits: np.ndarray, labels: np.ndarray, *, criterion: Criterion) -> float:
    """The temperature in [0.05, 20] at which the probabilities fit the labels best.

    Args:
        logits: (N, C).
        labels: (N,) class numbers.
        criterion: what is least: ``nll`` as in the source, or ``brier``, the squared distance to the one-hot label.

    Returns:
        The temperature. Found to 1e-4 relative, from the best of a grid on.

    Source: Guo et al., arXiv 1706.04599.
    """
    from scipy.optimize import minimize_scalar  # a second to import, which only this function needs

    def value(log_temperature: float) -> float:
        log_q = log_probabilities(logits / math.exp(log_temperature))
        on_label = log_q[np.arange(len(labels)), labels]
        if criterion == "nll":
            return float(-on_label.mean())
        return float((np.exp(2 * log_q).sum(axis=1) - 2 * np.exp(on_label) + 1).mean())

    grid = np.linspace(*_BOUNDS, _NUM_STARTS)
    best = int(np.argmin([value(point) for point in grid]))
    bracket = (grid[max(best - 1, 0)], grid[min(best + 1, _NUM_STARTS - 1)])
    return math.exp(float(minimize_scalar(value, bounds=bracket, method="bounded", options={"xatol": 1e-4}).x))
