"""The compiled correlations of a CPU agree with those of whole tensors, which a GPU takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.losses.cmkd import soft_spearman
from pipeline.losses.correlation import (
    PUBLISHED_FLOOR,
    SMOOTH_FLOOR,
    _SoftmaxCorrelations,
    _SoftmaxCorrelationsOnCpu,
    pearson,
    softmax_correlations,
)
from pipeline.losses.soft_rank import average_ranks, soft_rank

KINDS = ("random", "constant rows", "constant columns", "far", "ties", "equal", "certain")
every_kind = pytest.mark.parametrize("kind", KINDS)
every_shape = pytest.mark.parametrize("shape", [(1, 2), (2, 5), (37, 11), (5, 101), (257, 523)], ids=str)


def logits_of(kind: str, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    student, teacher = 2 * torch.randn(2, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    if kind == "constant rows":
        student[::2], teacher[::3] = 3.0, -1.0
    elif kind == "constant columns":
        student, teacher = student[:1].repeat(shape[0], 1), teacher[-1:].repeat(shape[0], 1)
    elif kind == "far":
        student, teacher = 1e4 * student.sign(), -1e4 * teacher.sign()
    elif kind == "ties":
        student, teacher = student.round(), teacher.round()
    elif kind == "equal":
        teacher = student.clone()
    elif kind == "certain":
        student = 1e4 * torch.eye(max(shape), dtype=torch.float64)[: shape[0], : shape[1]]
    return student.float().double(), teacher.float().double()


def value_and_gradient(function: Callable[[Tensor], list[Tensor]], student: Tensor) -> list[Tensor]:
    """Results, and the gradient of their sum with unequal weights."""
    student = student.clone().requires_grad_()
    results = function(student)
    weighted = [(result * torch.linspace(-1, 2, len(result), dtype=result.dtype)).sum() for result in results]
    return [*(result.detach() for result in results), torch.autograd.grad(sum(weighted), student)[0]]


def check_close(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one.double(), other, atol=tolerance, rtol=tolerance)


def correlations(
    compiled: bool, teacher: Tensor, floor: float, additive: bool, rows: bool, columns: bool
) -> Callable[[Tensor], list[Tensor]]:
    def function(student: Tensor) -> list[Tensor]:
        if compiled:
            found = softmax_correlations(
                student, teacher, temperature=2.0, floor=floor, additive=additive, rows=rows, columns=columns
            )
        else:
            found = _SoftmaxCorrelations.apply(student, teacher, 2.0, floor, additive, rows, columns)
        assert [result is not None for result in found] == [rows, columns]
        return [result for result in found if result is not None]

    return function


@every_kind
@every_shape
@pytest.mark.parametrize(("rows", "columns"), [(True, True), (True, False), (False, True)])
def test_compiled_correlations_are_those_of_tensors(
    kind: str, shape: tuple[int, int], rows: bool, columns: bool
) -> None:
    student, teacher = logits_of(kind, shape)
    options = (SMOOTH_FLOOR, False, rows, columns)
    expected = value_and_gradient(correlations(False, teacher, *options), student)
    check_close(value_and_gradient(correlations(True, teacher, *options), student), expected, 1e-8)
    narrow = value_and_gradient(correlations(True, teacher.float(), *options), student.float())
    assert {result.dtype for result in narrow} == {torch.float32}
    whole = value_and_gradient(correlations(False, teacher.float(), *options), student.float())
    for index, result in enumerate(narrow):  # no further from float64 than the tensors' float32, but for rounding
        bound = 2 * (whole[index] - expected[index]).abs().max() + 1e-6 * max(1, expected[index].abs().max())
        assert (result - expected[index]).abs().max() <= bound


@pytest.mark.parametrize("kind", ["random", "ties", "equal"])
@every_shape
def test_compiled_correlations_have_the_published_floor(kind: str, shape: tuple[int, int]) -> None:
    student, teacher = logits_of(kind, shape)
    options = (PUBLISHED_FLOOR, True, True, shape[0] > 1)
    expected = value_and_gradient(correlations(False, teacher, *options), student)
    check_close(value_and_gradient(correlations(True, teacher, *options), student), expected, 1e-8)


def compare_ranks(student: Tensor, teacher: Tensor, strength: float) -> tuple[list[Tensor], list[Tensor]]:
    def composed(values: Tensor) -> list[Tensor]:
        return [pearson(soft_rank(values, strength=strength)[0], average_ranks(teacher).to(values.dtype))]

    def compiled(values: Tensor) -> list[Tensor]:
        rho, num_blocks = soft_spearman(values, teacher, strength=strength)
        assert torch.equal(num_blocks, soft_rank(values, strength=strength)[1])
        return [rho]

    return value_and_gradient(compiled, student), value_and_gradient(composed, student)


@every_kind
@every_shape
@pytest.mark.parametrize("strength", [0.01, 0.3, 30.0])
def test_soft_spearman_is_pearson_of_ranks(kind: str, shape: tuple[int, int], strength: float) -> None:
    student, teacher = logits_of(kind, shape)
    check_close(*compare_ranks(student, teacher, strength), 1e-10)
    actual, expected = compare_ranks(student.float(), teacher.float(), strength)
    assert {result.dtype for result in actual} == {torch.float32}
    check_close(actual, [result.double() for result in expected], 1e-4)


def test_any_layout_and_number_of_threads_give_the_same_and_gradients_can_be_taken_twice() -> None:
    student, teacher = (logits.float() for logits in logits_of("random", (300, 500)))
    functions: list[Callable[[Tensor], list[Tensor]]] = [
        correlations(True, teacher, SMOOTH_FLOOR, False, True, True),
        lambda values: [soft_spearman(values, teacher)[0]],
    ]
    threads = torch.get_num_threads()
    for function in functions:
        expected = [result.double() for result in value_and_gradient(function, student)]
        check_close(value_and_gradient(function, student.T.contiguous().T), expected, 1e-6)
        try:
            torch.set_num_threads(3 - min(threads, 2))
            check_close(value_and_gradient(function, student), expected, 1e-6)
        finally:
            torch.set_num_threads(threads)
        values = student.clone().requires_grad_()
        total = function(values)[0].sum()
        (first,) = torch.autograd.grad(total, values, retain_graph=True)
        assert torch.equal(torch.autograd.grad(total, values)[0], first)


def test_what_is_no_number_stays_none() -> None:
    student, teacher = logits_of("random", (6, 5))
    student[2, 3] = float("nan")
    rows, columns, gradient = value_and_gradient(correlations(True, teacher, 1e-4, False, True, True), student)
    assert rows.isnan().tolist() == [False, False, True, False, False, False]
    assert columns.isnan().all()
    assert gradient.isnan().all()
    rho, gradient = value_and_gradient(lambda values: [soft_spearman(values, teacher)[0]], student)
    assert rho.isnan().tolist() == [False, False, True, False, False, False]
    assert gradient.isnan().any(dim=1).tolist() == rho.isnan().tolist()


@pytest.mark.parametrize("function", [_SoftmaxCorrelations, _SoftmaxCorrelationsOnCpu])
@pytest.mark.parametrize(("rows", "spread"), [(64, 8.0), (32, 20.0)])
def test_confident_logits_keep_their_digits(function: Any, rows: int, spread: float) -> None:
    """Most probabilities lie far below 1/C, and the columns' gradients are made of them."""
    torch.manual_seed(0)
    student, teacher = (torch.randn(rows, 1000, dtype=torch.float64) * spread for _ in range(2))
    gradients = []
    for dtype in (torch.float64, torch.float32):
        logits = student.to(dtype).clone().requires_grad_()
        _, rho = function.apply(logits, teacher.to(dtype), 1.0, 1e-8, True, False, True)
        rho.mean().backward()
        gradients.append(logits.grad.double())
    assert (gradients[1] - gradients[0]).norm() < 1e-5 * gradients[0].norm()
