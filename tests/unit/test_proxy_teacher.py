"""The proxy teacher against published numbers, a nested bisection, the perturbed loss and finite differences."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.errors import ConfigError, ModelError
from pipeline.evaluation.proxy_teacher import proxy_teacher, pull_back

TEACHER = np.array([[2.0, 1.0, 0.0, -2.0], [0.5, -1.0, 3.0, 0.0]])
LOWEST = -1 / np.arange(1, 6)
OF_CLASSES = np.array([[1.0, 0.5], [0.0, 0.0], [-0.5, 0.2], [0.0, 0.0]])


def random_logits(rows: int, classes: int, scale: float = 3.0, seed: int = 0) -> np.ndarray:
    return scale * np.random.default_rng(seed).normal(size=(rows, classes))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return torch.log_softmax(torch.from_numpy(logits), dim=1).numpy()


def random_coefficients(*shape: int, seed: int = 0) -> np.ndarray:
    """Admissible, some of them at the border."""
    generator = np.random.default_rng(seed)
    coefficients = LOWEST + (5 - LOWEST) * generator.random((*shape, 5)) ** 4
    return np.where(generator.random(coefficients.shape) < 0.1, LOWEST, coefficients)


def bisect(log_p: np.ndarray, coefficients: np.ndarray) -> np.ndarray:
    """The oracle: for every lambda the probabilities by bisection, and lambda by bisection on their sum."""
    orders = np.arange(1, coefficients.shape[-1] + 1)
    coefficients = np.broadcast_to(coefficients, (*log_p.shape, len(orders)))

    def log_side(log_q: np.ndarray) -> np.ndarray:
        u = -np.expm1(log_q)
        extra = (orders * coefficients * u[..., None] ** (orders - 1)).sum(axis=-1)
        return log_p + np.log(np.exp(-log_q) + extra)

    def solve(log_lambda: np.ndarray) -> np.ndarray:
        low, high = np.full_like(log_p, -60.0), np.zeros_like(log_p)
        for _ in range(60):
            middle = (low + high) / 2
            is_above = log_side(middle) > log_lambda
            low, high = np.where(is_above, middle, low), np.where(is_above, high, middle)
        return (low + high) / 2

    low = (log_p + np.log(np.maximum(1 + coefficients[..., 0], 1e-300))).max(axis=1, keepdims=True)
    high = log_side(np.full_like(log_p, -np.log(log_p.shape[1]))).max(axis=1, keepdims=True)
    for _ in range(60):
        middle = (low + high) / 2
        is_above = np.exp(solve(middle)).sum(axis=1, keepdims=True) > 1
        low, high = np.where(is_above, middle, low), np.where(is_above, high, middle)
    return solve((low + high) / 2)


@pytest.mark.parametrize(
    ("coefficients", "row", "expected"),
    [
        ([0.5, -0.25, 0, 0, 0], 0, [0.7015184799, 0.211754977, 0.0764145195, 0.0103120236]),
        ([0.5, -0.25], 1, [0.0527416498, 0.0117527194, 0.9035443172, 0.0319613136]),
        ([2.0], 0, [0.802288581, 0.146526086, 0.0454791763, 0.0057061567]),
        ([-0.9], 0, [0.5525588001, 0.2964728702, 0.1311942799, 0.0197740498]),
        (OF_CLASSES, 0, [0.7897640357, 0.1485519109, 0.0542880892, 0.0073959641]),
        (OF_CLASSES, 1, [0.1206731104, 0.0219482856, 0.7977169781, 0.0596616259]),
    ],
)
def test_fixtures_have_their_known_proxy_teachers(coefficients: object, row: int, expected: list[float]) -> None:
    found = np.exp(proxy_teacher(TEACHER, np.array(coefficients)))
    np.testing.assert_allclose(found[row], expected, atol=1e-10)


@pytest.mark.parametrize(
    ("coefficient", "expected", "log_lambda"),
    [
        (1.0, [0.8685170918, 0.1314829082], np.log(1.7211102551)),
        (-0.5, [0.7426660424, 0.2573339576], np.log(0.6772001873)),
    ],
)
def test_one_coefficient_and_two_classes_solve_a_quadratic_equation(
    coefficient: float, expected: list[float], log_lambda: float
) -> None:
    p = np.array([[0.8, 0.2]])
    found = np.exp(proxy_teacher(np.log(p), np.array([coefficient])))
    np.testing.assert_allclose(found[0], expected, atol=1e-10)
    np.testing.assert_allclose(found, p / (np.exp(log_lambda) - coefficient * p), atol=1e-9)


@pytest.mark.parametrize("shape", [(), (6,), (15, 1), (15, 6)])
@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_agrees_with_nested_bisection(shape: tuple[int, ...], scale: float) -> None:
    log_p = log_softmax(random_logits(15, 6, scale))
    for seed in range(3):
        # At the very border the oracle loses digits to cancellation.
        coefficients = np.maximum(random_coefficients(*shape, seed=seed), 0.98 * LOWEST)
        np.testing.assert_allclose(proxy_teacher(log_p, coefficients), bisect(log_p, coefficients), atol=2e-9)


def test_perturbed_loss_has_no_gradient_at_the_proxy_teacher() -> None:
    logits = random_logits(50, 12, 4.0)
    orders = torch.arange(1, 6)
    for seed, shape in enumerate([(), (12,), (50, 1), ()]):
        coefficients = random_coefficients(*shape, seed=seed)
        student = torch.from_numpy(proxy_teacher(logits, coefficients)).requires_grad_()
        log_q = torch.log_softmax(student, dim=1)
        p = torch.softmax(torch.from_numpy(logits), dim=1)
        powers = (-torch.expm1(log_q))[..., None] ** orders
        loss = (p * ((torch.from_numpy(coefficients) * powers).sum(dim=-1) - log_q)).sum()
        (gradient,) = torch.autograd.grad(loss, student)
        assert gradient.abs().max().item() <= 1e-9


def test_zero_coefficients_give_the_teacher_and_a_row_offset_changes_nothing() -> None:
    logits = random_logits(30, 7)
    log_p = log_softmax(logits)
    np.testing.assert_allclose(proxy_teacher(logits, np.zeros(5)), log_p, atol=1e-12)
    np.testing.assert_allclose(proxy_teacher(logits, np.zeros((7, 3))), log_p, atol=1e-12)
    coefficients = random_coefficients()
    moved = proxy_teacher(logits + np.arange(30)[:, None], coefficients)
    np.testing.assert_allclose(moved, proxy_teacher(logits, coefficients), atol=1e-9)


def test_shared_coefficients_keep_the_order_of_the_classes() -> None:
    logits = random_logits(200, 9)
    for seed in range(10):
        proxy = proxy_teacher(logits, random_coefficients(seed=seed))
        assert (proxy.argsort(axis=1) == logits.argsort(axis=1)).all()
        np.testing.assert_allclose(np.exp(proxy).sum(axis=1), 1, atol=1e-14)


def test_the_first_coefficient_sharpens_above_zero_and_flattens_below() -> None:
    tops = [np.exp(proxy_teacher(TEACHER, np.array([value]))).max(axis=1) for value in (-0.9, 0.0, 2.0)]
    assert (tops[0] < tops[1]).all()
    assert (tops[1] < tops[2]).all()


def test_classes_of_probability_zero_keep_it() -> None:
    logits = np.array([[1.0, -np.inf, 0.0], [-np.inf, 3.0, -np.inf]])
    proxy = proxy_teacher(logits, random_coefficients(3))
    np.testing.assert_array_equal(np.isneginf(proxy), np.isneginf(logits))
    np.testing.assert_allclose(np.exp(proxy).sum(axis=1), 1, atol=1e-14)
    without = proxy_teacher(logits[:1, [0, 2]], random_coefficients(3)[[0, 2]])
    np.testing.assert_allclose(proxy[:1, [0, 2]], without, atol=1e-9)


def test_the_border_is_solved_to_all_digits() -> None:
    # With eps_m = -1/m for all m up to 5 and two classes p / q u^5 is equal for both, that is q = p^(1/6) normalised.
    p = np.array([[0.9, 0.1], [0.5, 0.5], [1 - 1e-9, 1e-9], [1 - 1e-40, 1e-40]])
    expected = p ** (1 / 6) / (p ** (1 / 6)).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(np.exp(proxy_teacher(np.log(p), LOWEST)), expected, rtol=1e-9)


@pytest.mark.parametrize("scale", [30.0, 300.0, 1e4])
def test_an_all_but_certain_teacher_is_solved_at_the_border_too(scale: float) -> None:
    logits = np.concatenate([random_logits(60, 10, scale), np.zeros((1, 10)), np.eye(10) * scale])
    corners = [np.where(np.random.default_rng(seed).random(5) < 0.5, LOWEST, 5.0) for seed in range(12)]
    for coefficients in [LOWEST, np.full(5, 5.0), random_coefficients(10), *corners]:
        proxy = proxy_teacher(logits, coefficients)
        assert not np.isnan(proxy).any()
        np.testing.assert_allclose(np.exp(proxy).sum(axis=1), 1, atol=1e-14)


def test_rows_do_not_depend_on_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, coefficients = random_logits(25, 6), random_coefficients(25, 1)
    whole = proxy_teacher(logits, coefficients)
    monkeypatch.setattr("pipeline.evaluation.proxy_teacher._CHUNK_SIZE", 24)
    np.testing.assert_array_equal(proxy_teacher(logits, coefficients), whole)
    alone = np.concatenate([proxy_teacher(logits[[row]], coefficients[row, 0]) for row in range(25)])
    np.testing.assert_array_equal(alone, whole)


def test_pull_back_agrees_with_finite_differences() -> None:
    logits = random_logits(20, 5)
    coefficients = random_coefficients(5, seed=3) + 0.05
    weights = np.random.default_rng(1).normal(size=logits.shape)
    found = pull_back(proxy_teacher(logits, coefficients), coefficients, weights)
    expected, step = np.empty_like(coefficients), 1e-4
    for index in np.ndindex(coefficients.shape):
        sides = []
        for sign in (1, -1):
            moved = coefficients.copy()
            moved[index] += sign * step
            sides.append((weights * np.exp(proxy_teacher(logits, moved))).sum())
        expected[index] = (sides[0] - sides[1]) / (2 * step)
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("logits", "coefficients", "error", "message"),
    [
        (TEACHER, [0.0, -0.51], ConfigError, "coefficient 2 .* is -0.51 but at least -1/2"),
        (TEACHER, [np.nan], ConfigError, "coefficient 1 .* is nan"),
        (TEACHER, np.zeros((3, 2)), ModelError, r"\(3, 2\) do not fit 2 rows of 4 classes"),
        (TEACHER, 0.5, ModelError, r"shape \(\) do not fit"),
        (TEACHER[0], [0.0], ModelError, r"shape \(4,\) where \(rows, classes\)"),
        ([[0.0, np.nan]], [0.0], ModelError, "row 0 .* no finite largest value"),
        ([[0.0, 1.0], [np.inf, 0.0]], [0.0], ModelError, "row 1 .* inf"),
    ],
)
def test_what_has_no_proxy_teacher_is_refused(
    logits: object, coefficients: object, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        proxy_teacher(np.array(logits), np.array(coefficients))
