"""Coefficients of each class by gradient descent, held near those shared by all classes."""

from __future__ import annotations

import numpy as np

from pipeline.evaluation.perturbation_candidates import Score
from pipeline.evaluation.proxy_teacher import proxy_teacher, pull_back

_MAX_ITERATIONS = 15


def score_with_gradient(
    logits: np.ndarray, labels: np.ndarray, coefficients: np.ndarray, score: Score
) -> tuple[float, np.ndarray]:
    """Mean over the rows of ``score_rows`` of the proxy teacher, and its gradient.

    Args:
        logits: (N, C) of the teacher.
        labels: (N,).
        coefficients: (C, M).
        score: see ``score_rows``.

    Returns:
        The score, and (C, M).
    """
    log_q = proxy_teacher(logits, coefficients)
    residual = np.exp(log_q)
    residual[np.arange(len(labels)), labels] -= 1
    squared = (residual**2).sum(axis=1)
    if score == "squared":
        return float(squared.mean()), pull_back(log_q, coefficients, 2 / len(labels) * residual)
    norm = np.sqrt(squared)
    residual /= np.maximum(norm, 1e-12)[:, None] * len(labels)
    return float(norm.mean()), pull_back(log_q, coefficients, residual)


def descend(
    logits: np.ndarray,
    labels: np.ndarray,
    shared: np.ndarray,
    *,
    score: Score,
    strengths: tuple[float, ...],
    is_free: np.ndarray,
    upper: float,
) -> list[np.ndarray]:
    """Coefficients of each class that lower the score on these rows, for each strength of the pull to the shared ones.

    Least is ``score + strength * mean_c |eps_c - shared|^2`` within [-1/m, upper], by a quasi-Newton method (L-BFGS-B)
    from the shared coefficients on; every strength starts where the stronger one before it ended.

    Args:
        logits: (N, C) of the teacher.
        labels: (N,).
        shared: (M,).
        score: see ``score_rows``.
        strengths: positive, falling.
        is_free: (C,) bool; the other classes keep the shared coefficients.
        upper: largest coefficient.

    Returns:
        (C, M) for each strength.
    """
    from scipy.optimize import Bounds, minimize  # a second to import, which only this function needs

    lowest = -1 / np.arange(1, len(shared) + 1)
    num_free = int(is_free.sum())
    coefficients = np.tile(shared, (logits.shape[1], 1))

    def value(flat: np.ndarray, strength: float) -> tuple[float, np.ndarray]:
        trial = np.tile(shared, (logits.shape[1], 1))
        trial[is_free] = flat.reshape(num_free, -1)
        mean, gradient = score_with_gradient(logits, labels, trial, score)
        away = trial[is_free] - shared
        penalty = strength / num_free * float((away**2).sum())
        return mean + penalty, (gradient[is_free] + 2 * strength / num_free * away).ravel()

    found = []
    for strength in strengths:
        solution = minimize(
            value,
            coefficients[is_free].ravel(),
            args=(strength,),
            jac=True,
            method="L-BFGS-B",
            bounds=Bounds(np.tile(lowest, num_free), np.full(num_free * len(shared), upper)),
            options={"maxiter": _MAX_ITERATIONS, "maxfun": 2 * _MAX_ITERATIONS},
        )
        coefficients = coefficients.copy()
        coefficients[is_free] = np.clip(solution.x.reshape(num_free, -1), lowest, upper)
        found.append(coefficients)
    return found
