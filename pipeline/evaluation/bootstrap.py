"""Bootstrap intervals of means over rows."""

from __future__ import annotations

import numpy as np

from pipeline.registry import Params

_BATCH = 50  # resamples counted at a time: 4 MB at 10,000 rows


class Interval(Params):
    """A mean over rows, and the bounds between which it lies with the confidence that was asked for."""

    mean: float
    low: float
    high: float

    def show(self, digits: int = 4) -> str:
        """``mean (low to high)``."""
        return f"{self.mean:.{digits}f} ({self.low:.{digits}f} to {self.high:.{digits}f})"


def bootstrap_means(
    values: np.ndarray, *, seed: int, num_resamples: int = 1000, confidence: float = 0.95
) -> list[Interval]:
    """Percentile bootstrap of the mean of each column; rows are drawn with replacement, all columns of a row together.

    Columns are thereby paired: for the interval of a difference give the difference as a column.

    Args:
        values: (N, K) finite, N >= 1.
        seed: of the draws; the same seed and N give the same draws whatever the values are.
        num_resamples: at least 1.
        confidence: in (0, 1), of each interval by itself.
    """
    num_rows = len(values)
    generator = np.random.default_rng(seed)
    means = np.empty((num_resamples, values.shape[1]))
    for begin in range(0, num_resamples, _BATCH):
        size = min(_BATCH, num_resamples - begin)
        draws = generator.integers(num_rows, size=(size, num_rows)) + np.arange(size)[:, None] * num_rows
        counts = np.bincount(draws.ravel(), minlength=size * num_rows).reshape(size, num_rows)
        means[begin : begin + size] = counts.astype(np.float64) @ values
    means /= num_rows
    tail = (1 - confidence) / 2
    bounds = np.quantile(means, [tail, 1 - tail], axis=0)
    return [
        Interval(mean=float(mean), low=float(low), high=float(high))
        for mean, low, high in zip(values.mean(axis=0), *bounds, strict=True)
    ]
