"""Intervals of means over a few seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence

from scipy import stats

from pipeline.evaluation.bootstrap import Interval


def mean_over_seeds(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Mean of independent runs with the interval of Student's t; for a gain give the differences of paired runs.

    Of a single value the bounds are not a number: one seed says nothing about the next.
    """
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return Interval(mean=mean, low=math.nan, high=math.nan)
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    half = float(stats.t.ppf(0.5 + confidence / 2, len(values) - 1)) * math.sqrt(variance / len(values))
    return Interval(mean=mean, low=mean - half, high=mean + half)
