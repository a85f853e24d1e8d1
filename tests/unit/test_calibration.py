"""Bootstrap intervals, temperature scaling and reliability curves."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.evaluation import Tally
from pipeline.evaluation.bootstrap import bootstrap_means
from pipeline.evaluation.reliability import reliability_curve
from pipeline.evaluation.temperature_scaling import Criterion, fit_temperature


def draw_rows(rows: int, classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits, and labels drawn from their softmax."""
    generator = np.random.default_rng(seed)
    logits = 2 * generator.normal(size=(rows, classes))
    noise = generator.gumbel(size=logits.shape)
    return logits, (logits + noise).argmax(axis=1)


def test_bootstrap_interval_is_about_two_standard_errors_wide() -> None:
    values = np.random.default_rng(0).normal(size=(2000, 2)) * [1.0, 10.0] + [0.0, 5.0]
    for interval, column in zip(bootstrap_means(values, seed=1, num_resamples=2000), values.T, strict=True):
        error = column.std() / np.sqrt(len(column))
        assert interval.mean == pytest.approx(column.mean())
        assert interval.low == pytest.approx(column.mean() - 1.96 * error, abs=0.15 * error)
        assert interval.high == pytest.approx(column.mean() + 1.96 * error, abs=0.15 * error)


def test_bootstrap_interval_covers_the_truth_as_often_as_it_says() -> None:
    generator = np.random.default_rng(3)
    samples = generator.exponential(size=(200, 300)) - 1
    covered = [
        interval.low <= 0 <= interval.high
        for sample in range(300)
        for interval in bootstrap_means(samples[:, [sample]], seed=sample, num_resamples=300, confidence=0.9)
    ]
    assert 0.84 < np.mean(covered) < 0.95


def test_bootstrap_draws_whole_rows_and_depends_on_the_seed_alone() -> None:
    column = np.random.default_rng(0).normal(size=500)
    first, shifted, zero = bootstrap_means(np.stack([column, column + 3, 0 * column], axis=1), seed=5)
    assert shifted.low - first.low == pytest.approx(3)
    assert (zero.low, zero.high) == (0, 0)
    for values in (column, 2 * column):
        (alone,) = bootstrap_means(values[:, None], seed=5)
        assert alone.low / first.low == pytest.approx(values[0] / column[0])
    assert bootstrap_means(column[:, None], seed=6) != bootstrap_means(column[:, None], seed=5)


@pytest.mark.parametrize("criterion", ["brier", "nll"])
@pytest.mark.parametrize("factor", [0.4, 1.0, 3.0])
def test_fit_temperature_undoes_a_factor(criterion: Criterion, factor: float) -> None:
    logits, labels = draw_rows(20_000, 5)
    assert fit_temperature(factor * logits, labels, criterion=criterion) == pytest.approx(factor, rel=0.04)


def test_fit_temperature_is_the_minimum() -> None:
    logits, labels = draw_rows(500, 4)
    temperature = fit_temperature(logits, labels, criterion="nll")

    def nll(value: float) -> float:
        return torch.nn.functional.cross_entropy(torch.from_numpy(logits / value), torch.from_numpy(labels)).item()

    assert nll(temperature) < min(nll(0.99 * temperature), nll(1.01 * temperature))


def test_fit_temperature_stays_within_its_bounds() -> None:
    logits = np.eye(4)[[0, 1, 2, 3]]
    assert fit_temperature(logits, np.arange(4), criterion="nll") == pytest.approx(0.05, rel=0.01)
    assert fit_temperature(logits, np.array([1, 2, 3, 0]), criterion="brier") == pytest.approx(20, rel=0.01)


def test_reliability_curve_has_the_ece_of_the_metrics() -> None:
    logits, labels = draw_rows(3000, 6)
    curve = reliability_curve("teacher", torch.softmax(torch.from_numpy(2 * logits), dim=1).numpy(), labels)
    tally = Tally(6)
    tally.update(torch.from_numpy(2 * logits), torch.from_numpy(labels))
    assert curve.ece == pytest.approx(tally.compute()["val/ece"], abs=1e-12)
    assert sum(curve.num_rows) == 3000
    assert all(low < high for low, high in zip(curve.confidence, curve.confidence[1:], strict=False))
    right = sum(rows * accuracy for rows, accuracy in zip(curve.num_rows, curve.accuracy, strict=True))
    assert right == pytest.approx((logits.argmax(axis=1) == labels).sum())
