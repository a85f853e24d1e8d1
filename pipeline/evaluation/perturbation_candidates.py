"""Candidates for the coefficients of the perturbed loss, and how near each one's proxy teacher is to the truth."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import numpy as np

from pipeline.evaluation.proxy_teacher import proxy_teacher

Score = Literal["squared", "norm"]


def draw_candidates(order: int, num_candidates: int, *, upper: float, seed: int) -> np.ndarray:
    """Scrambled Sobol points among the admissible coefficients, after zero.

    Half of each axis is below zero, where ``eps_m`` runs evenly over [-1/m, 0], and half above, where it runs over
    [0, upper] with its square root even. Points even over all of [-1/m, upper], as one may also read the source,
    flatten a teacher almost never: with order 5 one in 4e5 has no coefficient above 0.

    Args:
        order: number of coefficients, M.
        num_candidates: of those returned, zero included.
        upper: largest coefficient.
        seed: of the scrambling.

    Returns:
        (num_candidates, M); the first is zero.
    """
    from scipy.stats import qmc  # a second to import, which only this function needs

    power = math.ceil(math.log2(max(num_candidates - 1, 1)))  # Sobol points are balanced by powers of two
    points = 2 * qmc.Sobol(order, rng=np.random.default_rng(seed)).random_base2(power)[: num_candidates - 1] - 1
    lowest = -1 / np.arange(1, order + 1)
    return np.concatenate([np.zeros((1, order)), np.where(points < 0, -points * lowest, upper * points**2)])


def score_rows(log_q: np.ndarray, labels: np.ndarray, score: Score) -> np.ndarray:
    """Distance of each row's probabilities to its one-hot label.

    Args:
        log_q: (N, C) log-probabilities.
        labels: (N,) class numbers.
        score: ``squared``: the squared norm (Brier), whose mean is least at the true probabilities; ``norm``: the
            norm itself, as in the source, whose mean is least somewhere sharper than the truth.

    Returns:
        (N,) in [0, 2], or [0, sqrt(2)].
    """
    q = np.exp(log_q)
    on_label = q[np.arange(len(labels)), labels]
    # Not sum q^2 - 2 q_y + 1, which may end below 0 for a row that is right and sure.
    squared: np.ndarray = np.maximum((q**2).sum(axis=1) - on_label**2, 0) + (1 - on_label) ** 2
    return squared if score == "squared" else np.sqrt(squared)


class Ranking(NamedTuple):
    """The finalists, best first, and what each row says of them."""

    coefficients: np.ndarray
    """(F, M)."""
    row_scores: np.ndarray
    """(N, F)."""

    @property
    def best(self) -> np.ndarray:
        """(M,) coefficients of the lowest mean score."""
        best: np.ndarray = self.coefficients[0]
        return best


def rank_candidates(
    logits: np.ndarray,
    labels: np.ndarray,
    candidates: np.ndarray,
    *,
    score: Score,
    num_screening_rows: int,
    num_finalists: int,
    seed: int,
) -> Ranking:
    """Scores all candidates on some of the rows, and the best of them and zero on all.

    Args:
        logits: (N, C) of the teacher.
        labels: (N,).
        candidates: (K, M), the first of which is zero.
        score: see ``score_rows``.
        num_screening_rows: on how many rows, drawn at random, all candidates are scored.
        num_finalists: how many of them, beside zero, are scored on all rows.
        seed: of the draw.

    Returns:
        The finalists and zero in order of their mean scores; of equal ones zero comes first.
    """

    def scores(of: np.ndarray, rows: np.ndarray | slice) -> np.ndarray:
        proxies = (proxy_teacher(logits[rows], coefficients) for coefficients in of)
        return np.stack([score_rows(log_q, labels[rows], score) for log_q in proxies], axis=1)

    rows = np.random.default_rng(seed).permutation(len(labels))[:num_screening_rows]
    order = np.argsort(scores(candidates, np.sort(rows)).mean(axis=0), kind="stable")
    finalists = candidates[np.concatenate([[0], order[order != 0][:num_finalists]])]
    row_scores = scores(finalists, slice(None))
    order = np.argsort(row_scores.mean(axis=0), kind="stable")
    return Ranking(finalists[order], row_scores[:, order])
