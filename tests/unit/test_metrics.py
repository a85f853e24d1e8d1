"""Metrics against an independent NumPy version, hand numbers and every way to split the rows."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.errors import DataError, ModelError
from pipeline.evaluation import METRIC_DIRECTIONS, EvaluationParams, Tally


def random_rows(rows: int = 97, classes: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    student = 2 * torch.randn(rows, classes, generator=generator)
    teacher = 2 * torch.randn(rows, classes, generator=generator)
    return student, torch.randint(classes, (rows,), generator=generator), teacher


def tally_of(student: Tensor, labels: Tensor, teacher: Tensor | None = None) -> Tally:
    tally = Tally(student.shape[1], with_teacher=teacher is not None)
    tally.update(student, labels, teacher)
    return tally


def numpy_metrics(student: np.ndarray, labels: np.ndarray, teacher: np.ndarray) -> dict[str, float]:
    """Straight from the definitions, one row at a time."""
    sums = dict.fromkeys(METRIC_DIRECTIONS, 0.0)
    bins: dict[int, list[tuple[float, bool]]] = {}
    for z_s, y, z_t in zip(student.astype(float), labels, teacher.astype(float), strict=True):
        p_s, p_t = (np.exp(z - z.max()) / np.exp(z - z.max()).sum() for z in (z_s, z_t))
        order = sorted(range(len(z_s)), key=lambda k: (-z_s[k], k))
        sums["top1"] += order[0] == y
        sums["top5"] += y in order[:5]
        sums["nll"] -= math.log(p_s[y])
        sums["brier"] += sum((p_s[k] - (k == y)) ** 2 for k in range(len(z_s)))
        sums["agreement"] += order[0] == int(np.argmax(z_t))
        sums["teacher_kl"] += float((p_t * np.log(p_t / p_s)).sum())
        bins.setdefault(math.ceil(p_s.max() * 15), []).append((float(p_s.max()), order[0] == y))
    for rows in bins.values():
        sums["ece"] += abs(sum(confidence - correct for confidence, correct in rows))
    return {f"val/{name}": value / len(labels) for name, value in sums.items()} | {"val/num_rows": float(len(labels))}


def test_metrics_agree_with_numpy() -> None:
    student, labels, teacher = random_rows()
    metrics = tally_of(student, labels, teacher).compute()
    assert metrics == pytest.approx(numpy_metrics(student.numpy(), labels.numpy(), teacher.numpy()), rel=1e-12)


def test_hand_numbers() -> None:
    probabilities = torch.tensor([[0.7, 0.2, 0.1], [0.3, 0.6, 0.1], [0.1, 0.8, 0.1]], dtype=torch.float64)
    tally = tally_of(probabilities.log(), torch.tensor([0, 1, 2]), probabilities.log())
    assert tally.compute("test") == pytest.approx(
        {
            "test/top1": 2 / 3,
            "test/top5": 1.0,
            "test/nll": -math.log(0.7 * 0.6 * 0.1) / 3,
            "test/brier": (0.14 + 0.26 + 1.46) / 3,
            "test/ece": (0.3 + 0.4 + 0.8) / 3,
            "test/agreement": 1.0,
            "test/teacher_kl": 0.0,
            "test/num_rows": 3.0,
        },
        abs=1e-12,
    )
    assert tally.per_class() == [1.0, 1.0, 0.0]


def test_a_confidence_on_an_edge_belongs_to_the_lower_bin() -> None:
    # 0.6 = 9/15 shares a bin with 0.59: one right and one wrong cancel there, and would not across two bins.
    rows = torch.tensor([[0.6, 0.4], [0.59, 0.41]], dtype=torch.float64).log()
    assert tally_of(rows, torch.tensor([0, 1])).compute()["val/ece"] == pytest.approx(abs(0.6 + 0.59 - 1) / 2)


@pytest.mark.parametrize("batch_size", [1, 2, 13, 96, 97])
def test_any_split_of_the_rows_adds_up_to_the_same(batch_size: int) -> None:
    student, labels, teacher = random_rows()
    whole = tally_of(student, labels, teacher)
    states = [
        tally_of(*rows).state()
        for rows in zip(*(part.split(batch_size) for part in (student, labels, teacher)), strict=True)
    ]
    total = Tally(7, with_teacher=True)
    total.load(torch.stack(states).sum(0))
    exact = ("val/num_rows", "val/top1", "val/top5", "val/agreement")
    assert [total.compute()[name] for name in exact] == [whole.compute()[name] for name in exact]
    assert total.per_class() == whole.per_class()
    assert total.compute() == pytest.approx(whole.compute(), rel=1e-12)


def test_updates_add_up_like_states() -> None:
    student, labels, teacher = random_rows()
    tally = Tally(7, with_teacher=True)
    for rows in zip(student.split(10), labels.split(10), teacher.split(10), strict=True):
        tally.update(*rows)
    assert tally.compute() == pytest.approx(tally_of(student, labels, teacher).compute(), rel=1e-12)


def test_a_state_is_a_copy_of_known_shape() -> None:
    tally = tally_of(*random_rows()[:2])
    state = tally.state()
    assert state.ndim == 1
    assert state.dtype == torch.float64
    state.zero_()
    assert tally.compute()["val/num_rows"] == 97
    with pytest.raises(ValueError, match="state of shape"):
        Tally(8).load(tally.state())


def test_ties_go_to_the_lowest_class() -> None:
    equal = torch.zeros(8, 8)
    tally = tally_of(equal, torch.arange(8), equal)
    assert tally.compute()["val/top1"] == pytest.approx(1 / 8)
    assert tally.compute()["val/top5"] == pytest.approx(5 / 8)
    assert tally.compute()["val/agreement"] == 1
    assert tally.per_class() == [1.0, *[0.0] * 7]


def test_a_row_with_a_nan_is_never_correct_and_shows() -> None:
    logits = torch.tensor([[math.nan, 5.0, 0.0], [0.0, 5.0, math.nan], [0.0, 5.0, 0.0]])
    tally = tally_of(logits, torch.tensor([1, 1, 1]), logits)
    metrics = tally.compute()
    assert metrics["val/top1"] == metrics["val/top5"] == metrics["val/agreement"] == pytest.approx(1 / 3)
    assert all(math.isnan(metrics[f"val/{name}"]) for name in ("nll", "brier", "ece", "teacher_kl"))
    assert tally.per_class()[1] == pytest.approx(1 / 3)


def test_confident_logits_stay_finite_and_bf16_is_widened() -> None:
    logits = torch.tensor([[1e4, -1e4], [-1e4, 1e4]], dtype=torch.bfloat16)
    metrics = tally_of(logits, torch.tensor([0, 0]), logits).compute()
    assert metrics["val/nll"] == pytest.approx(float(logits[0, 0] - logits[0, 1]) / 2)
    assert metrics["val/brier"] == pytest.approx(1.0)
    assert metrics["val/ece"] == pytest.approx(0.5)


def test_a_class_without_rows_has_no_accuracy() -> None:
    accuracies = tally_of(torch.eye(3), torch.tensor([0, 1, 0])).per_class()
    assert accuracies[:2] == [0.5, 1.0]
    assert math.isnan(accuracies[2])


def test_every_metric_has_a_direction() -> None:
    student, labels, teacher = random_rows()
    with_teacher = tally_of(student, labels, teacher).compute("val")
    assert {name.removeprefix("val/") for name in with_teacher} == {*METRIC_DIRECTIONS, "num_rows"}
    alone = tally_of(student, labels).compute("val")
    assert with_teacher.keys() - alone.keys() == {"val/agreement", "val/teacher_kl"}
    assert alone == {name: with_teacher[name] for name in alone}


def test_wrong_input_is_refused() -> None:
    student, labels, teacher = random_rows()
    with pytest.raises(ModelError, match=r"student logits have shape \(97, 7\) where \(97, 3\)"):
        Tally(3).update(student, labels)
    with pytest.raises(ModelError, match=r"teacher logits have shape \(97, 6\)"):
        Tally(7, with_teacher=True).update(student, labels, teacher[:, :6])
    with pytest.raises(ValueError, match="with_teacher=True"):
        Tally(7, with_teacher=True).update(student, labels)
    with pytest.raises(DataError, match="no rows to compute test metrics"):
        Tally(7).compute("test")


def test_evaluation_params_have_bounds() -> None:
    assert EvaluationParams().batch_size == 256
    with pytest.raises(ValueError, match="batch_size"):
        EvaluationParams(batch_size=0)
