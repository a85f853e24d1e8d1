"""The likeliest classes of a row, and what stands for the others at any temperature."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from pipeline.errors import ConfigError

TEMPERATURES = (1.0, 2.0, 4.0, 8.0, 20.0)
"""At these the log-sum-exp of the classes that are not kept is stored: from one of them alone their mass at another
would be wrong by 0.15."""

# Knots of the interpolation: the inverse temperatures, and 0, where the sum just counts classes.
_KNOTS = np.array([1 / temperature for temperature in TEMPERATURES] + [0.0])


def select_topk(logits: np.ndarray, k: int) -> np.ndarray:
    """The k likeliest classes of each row, the likeliest first; of equal ones, those of the lowest number.

    Args:
        logits: (B, C).

    Returns:
        (B, k) int64.
    """
    num_rows, num_classes = logits.shape
    if k == num_classes:
        kept = np.broadcast_to(np.arange(num_classes), logits.shape)
    else:
        # A partition leaves it open which of equal logits it takes, and does differ between processors.
        smallest = np.partition(logits, num_classes - k, axis=1)[:, num_classes - k, None]
        chosen = logits >= smallest
        for row in np.flatnonzero(chosen.sum(axis=1) > k):
            equal = np.flatnonzero(logits[row] == smallest[row])
            chosen[row, equal[k - np.count_nonzero(logits[row] > smallest[row]) :]] = False
        kept = np.nonzero(chosen)[1].reshape(num_rows, k)
    order = np.argsort(-np.take_along_axis(logits, kept, axis=1), axis=1, kind="stable")
    return np.take_along_axis(kept, order, axis=1)


def measure_tail(logits: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Log-sum-exp of the classes that are not kept, of (logits - row's maximum) / temperature.

    Args:
        logits: (B, C).
        ids: (B, k) the classes that are kept.

    Returns:
        (B, 5) float32, by ``TEMPERATURES``; minus infinity where every class is kept.
    """
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    np.put_along_axis(shifted, ids, -np.inf, axis=1)
    largest = shifted.max(axis=1)
    if ids.shape[1] == logits.shape[1]:
        return np.full((len(logits), len(TEMPERATURES)), -np.inf, np.float32)
    shifted -= largest[:, None]  # so that each sum is at least 1, however far the others lie below the maximum
    at_20, at_4 = np.exp(shifted / 20), np.exp(shifted / 4)
    at_2 = at_4 * at_4
    exponentials = (at_2 * at_2, at_2, at_4, np.sqrt(at_4), at_20)  # two exponentials instead of five
    sums = np.stack([values.sum(axis=1) for values in exponentials], axis=1)
    tail: np.ndarray = (np.log(sums) + largest[:, None] / np.array(TEMPERATURES)).astype(np.float32)
    return tail


def spread_tail(tail: np.ndarray, num_others: int, temperature: float, smallest_kept: np.ndarray) -> np.ndarray:
    """One logit for all classes that are not kept, such that their mass at a temperature is as stored.

    Between the stored temperatures, log-sum-exp is interpolated by a cubic spline in 1/temperature, down to 0, where it
    is the logarithm of the number of classes. It is convex there, so chords bound it from above and, prolonged, from
    below; the spline is kept between them. At the stored temperatures it is exact.

    Args:
        tail: (B, 5) as of ``measure_tail``.
        num_others: classes that are not kept, at least 1.
        temperature: 1 to 20.
        smallest_kept: (B,) logit of the last class kept, relative to the row's maximum: a bound too.

    Returns:
        (B,) float64, relative to the row's maximum.

    Raises:
        ConfigError: another temperature.
    """
    check_temperature(temperature)
    counted = np.full((len(tail), 1), np.log(num_others))
    values = np.concatenate([tail.astype(np.float64), counted], axis=1)
    if temperature in TEMPERATURES:
        return temperature * (values[:, TEMPERATURES.index(temperature)] - np.log(num_others))
    spread = temperature * (_interpolate(values, 1 / temperature) - np.log(num_others))
    return np.minimum(spread, smallest_kept)


def check_temperature(temperature: float) -> None:
    """Refuses a temperature at which the mass of the other classes is not known.

    Raises:
        ConfigError: outside of the stored ones.
    """
    if not TEMPERATURES[0] <= temperature <= TEMPERATURES[-1]:
        raise ConfigError(
            f"a top-k cache knows the mass of the classes it leaves out at temperatures {TEMPERATURES[0]:g} to "
            f"{TEMPERATURES[-1]:g}, got {temperature:g}; set a temperature between them, or cache.format=dense "
            "cache.k=null."
        )


def _interpolate(values: np.ndarray, position: float) -> np.ndarray:
    """(B,) of (B, 6) values at the knots, at an inverse temperature that is none of them."""
    after = int(np.flatnonzero(position > _KNOTS)[0])  # knots descend
    before = after - 1
    highest = _prolong(values, before, after, position)
    lowest = _prolong(values, before - 1, before, position) if before > 0 else np.full(len(values), -np.inf)
    if after + 1 < len(_KNOTS):
        lowest = np.maximum(lowest, _prolong(values, after, after + 1, position))
    return np.clip(values @ _spline_weights(position), np.minimum(lowest, highest), highest)


def _prolong(values: np.ndarray, one: int, other: int, position: float) -> np.ndarray:
    share = (position - _KNOTS[one]) / (_KNOTS[other] - _KNOTS[one])
    return values[:, one] + share * (values[:, other] - values[:, one])


@lru_cache(maxsize=32)
def _spline_weights(position: float) -> np.ndarray:
    """(6,): a spline through given knots is linear in the values there.

    A cubic spline of which the second knot and the last but one are none ("not a knot") has as many unknowns as knots.
    """
    weights: np.ndarray = np.linalg.solve(_cubics(_KNOTS), _cubics(np.array([position]))[:, 0])
    return weights


def _cubics(positions: np.ndarray) -> np.ndarray:
    """(6, N) the functions whose sums these splines are."""
    powers = [positions**exponent for exponent in range(4)]
    return np.stack(powers + [np.maximum(positions - knot, 0) ** 3 for knot in _KNOTS[2:4]])
