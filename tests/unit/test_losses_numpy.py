"""Every newer loss against an independent version in NumPy, and its gradient against finite differences."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata
from torch import Tensor

from pipeline.losses import LossParams, Objective, Signals
from pipeline.losses.cmkd import CMKDParams
from pipeline.losses.dist import DISTParams
from pipeline.losses.dkd import DKDParams
from pipeline.losses.levels import LevelsParams
from pipeline.losses.perturbation import Perturbation
from pipeline.losses.ptloss import PTLossParams
from pipeline.losses.soft_rank import average_ranks, soft_rank

Array = NDArray[np.float64]


def np_softmax(z: Array, temperature: float = 1.0) -> Array:
    e = np.exp(z / temperature - (z / temperature).max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def np_ce(z: Array, labels: NDArray[np.int64]) -> float:
    return float(-np.log(np_softmax(z)[range(len(z)), labels]).mean())


def np_corr(u: Array, v: Array, floor: float = 1e-4) -> Array:
    a, b = u - u.mean(1, keepdims=True), v - v.mean(1, keepdims=True)
    return (a * b).sum(1) / np.sqrt(((a**2).sum(1) + floor**2) * ((b**2).sum(1) + floor**2))


def np_ptloss(z_s: Array, z_t: Array, coefficients: Array, temperature: float) -> float:
    q, p = np_softmax(z_s, temperature), np_softmax(z_t, temperature)
    total = p * (np.log(p) - np.log(q))
    for m in range(coefficients.shape[-1]):
        total = total + p * coefficients[..., m] * (1 - q) ** (m + 1)
    return float(temperature**2 * total.sum(1).mean())


def np_dist(z_s: Array, z_t: Array, temperature: float) -> float:
    q, p = np_softmax(z_s, temperature), np_softmax(z_t, temperature)
    return float(temperature**2 * (2 - np_corr(q, p).mean() - np_corr(q.T, p.T).mean()))


def np_isotonic(y: Array) -> Array:
    """Non-increasing fit by the min-max formula, O(n^3)."""
    n = len(y)
    return np.array([min(max(y[i : j + 1].mean() for j in range(k, n)) for i in range(k + 1)) for k in range(n)])


def np_soft_rank(x: Array, strength: float) -> Array:
    result = np.empty_like(x)
    for i, values in enumerate(x):
        order = np.argsort(-values)
        s = values[order] / strength
        result[i, order] = s - np_isotonic(s - np.arange(len(s), 0, -1))
    return result


def np_cmkd(z_s: Array, z_t: Array) -> float:
    def scale(z: Array) -> Array:
        return (z - z.mean(1, keepdims=True)) / (z.std(1, ddof=1, keepdims=True) + 1e-7)

    p = np_softmax(z_t)
    h = -(p * np.log(p)).sum(1) / np.log(p.shape[1])
    of_values = np_corr(np_softmax(scale(z_s), 4.0), np_softmax(scale(z_t), 4.0))
    of_ranks = np_corr(np_soft_rank(scale(z_s), 1 / p.shape[1]), rankdata(z_t, axis=1))
    return float(((1 - h) * (1 - of_values) + h * (1 - of_ranks)).mean())


def np_dkd(z_s: Array, z_t: Array, labels: NDArray[np.int64], temperature: float) -> float:
    total = 0.0
    for s, t, y in zip(np_softmax(z_s, temperature), np_softmax(z_t, temperature), labels, strict=True):
        b_s, b_t = np.array([s[y], 1 - s[y]]), np.array([t[y], 1 - t[y]])
        n_s, n_t = np.delete(s, y) / (1 - s[y]), np.delete(t, y) / (1 - t[y])
        total += (b_t * np.log(b_t / b_s)).sum() + 8 * (n_t * np.log(n_t / n_s)).sum()
    return float(temperature**2 * total / len(labels))


def np_partial(z_s: Array, z_t: Array, labels: NDArray[np.int64], temperature: float) -> float:
    p, rows = np_softmax(z_t, temperature), range(len(z_s))
    targets = np.repeat((1 - p[rows, labels])[:, None] / (p.shape[1] - 1), p.shape[1], axis=1)
    targets[rows, labels] = p[rows, labels]
    return float(temperature**2 * (targets * np.log(targets / np_softmax(z_s, temperature))).sum(1).mean())


def random_logits(rows: int = 6, classes: int = 5, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student = 2 * torch.randn(rows, classes, generator=generator, dtype=torch.float64)
    teacher = 2 * torch.randn(rows, classes, generator=generator, dtype=torch.float64)
    return student.requires_grad_(), teacher, torch.randint(classes, (rows,), generator=generator)


BY_CLASS = tuple((0.1 * c, -0.2, 0.3) for c in range(5))
ORACLES: list[tuple[LossParams, Callable[[Array, Array, NDArray[np.int64]], float]]] = [
    (PTLossParams(), lambda s, t, y: np_ptloss(s, t, np.array([1.0]), 1.0)),
    (
        PTLossParams(perturbation=(0.5, -0.25, 2.0), temperature=3.0, ce_weight=0.5),
        lambda s, t, y: np_ptloss(s, t, np.array([0.5, -0.25, 2.0]), 3.0) + 0.5 * np_ce(s, y),
    ),
    (
        PTLossParams(
            perturbation_from="p.json", selected=Perturbation(kind="class", num_classes=5, coefficients=BY_CLASS)
        ),
        lambda s, t, y: np_ptloss(s, t, np.array(BY_CLASS), 1.0),
    ),
    (DISTParams(), lambda s, t, y: 2 * np_dist(s, t, 4.0) + np_ce(s, y)),
    (DISTParams(temperature=1.5, ce_weight=0), lambda s, t, y: 2 * np_dist(s, t, 1.5)),
    (CMKDParams(), lambda s, t, y: 2 * np_cmkd(s, t) + np_ce(s, y)),
    (DKDParams(), lambda s, t, y: np_dkd(s, t, y, 4.0) + np_ce(s, y)),
    (LevelsParams(), lambda s, t, y: 0.9 * np_partial(s, t, y, 4.0) + 0.1 * np_ce(s, y)),
]


@pytest.mark.parametrize(("params", "oracle"), [pytest.param(*case, id=case[0].name) for case in ORACLES])
def test_totals_agree_with_numpy(params: LossParams, oracle: Callable[..., float]) -> None:
    student, teacher, labels = random_logits(9, 5, seed=3)
    objective = Objective(params)
    total, _ = objective(Signals(student, labels, teacher))
    assert total.item() == pytest.approx(oracle(student.detach().numpy(), teacher.numpy(), labels.numpy()), rel=1e-10)
    assert torch.autograd.gradcheck(lambda logits: objective(Signals(logits, labels, teacher))[0], (student,))


def test_soft_ranks_agree_with_numpy() -> None:
    values = random_logits(20, 9)[1]
    for strength in (0.05, 0.3, 2.0):
        ranks, _ = soft_rank(values, strength=strength)
        torch.testing.assert_close(ranks, torch.from_numpy(np_soft_rank(values.numpy(), strength)), atol=1e-12, rtol=0)
    assert np.array_equal(average_ranks(values).numpy(), rankdata(values.numpy(), axis=1))
