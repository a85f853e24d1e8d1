"""Selection of perturbation coefficients where the truth is known, and the parts it is made of."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from pipeline.errors import ConfigError, DataError, ModelError
from pipeline.evaluation.perturbation_candidates import draw_candidates, rank_candidates, score_rows
from pipeline.evaluation.perturbation_descent import descend, score_with_gradient
from pipeline.evaluation.perturbation_selection import select_perturbation, split_halves
from pipeline.evaluation.proxy_teacher import proxy_teacher
from pipeline.evaluation.selection import Selection, SelectionParams
from pipeline.report.perturbation_plots import plot_candidates, plot_reliability

LOWEST = -1 / np.arange(1, 6)
SMALL = {"num_candidates": 32, "num_screening_rows": 400, "num_finalists": 6, "num_resamples": 300}


def draw_rows(rows: int, classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The true log-probabilities, up to a constant, and labels drawn from them."""
    generator = np.random.default_rng(seed)
    logits = 2 * generator.normal(size=(rows, classes))
    return logits, (logits + generator.gumbel(size=logits.shape)).argmax(axis=1)


def select(logits: np.ndarray, labels: np.ndarray, **values: object) -> Selection:
    return select_perturbation(logits, labels, SelectionParams.model_validate(SMALL | values))


# --- candidates and scores --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("order", "number"), [(5, 256), (1, 2), (3, 100)])
def test_candidates_are_admissible_and_begin_with_zero(order: int, number: int) -> None:
    candidates = draw_candidates(order, number, upper=5.0, seed=0)
    assert candidates.shape == (number, order)
    assert not candidates[0].any()
    assert (candidates >= -1 / np.arange(1, order + 1)).all()
    assert (candidates <= 5).all()
    np.testing.assert_array_equal(candidates, draw_candidates(order, number, upper=5.0, seed=0))
    assert (candidates[1:] != draw_candidates(order, number, upper=5.0, seed=1)[1:]).all()


def test_candidates_lie_on_both_sides_of_zero() -> None:
    candidates = draw_candidates(5, 257, upper=5.0, seed=0)[1:]
    np.testing.assert_array_equal((candidates < 0).sum(axis=0), 128)
    assert {tuple(row) for row in candidates < 0} == {tuple(row) for row in np.ndindex(2, 2, 2, 2, 2)}


def test_scores_are_distances_to_the_one_hot_label() -> None:
    q = np.array([[0.5, 0.3, 0.2], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
    labels = np.array([1, 2, 1])
    with np.errstate(divide="ignore"):
        log_q = np.log(q)
    expected = ((q - np.eye(3)[labels]) ** 2).sum(axis=1)
    np.testing.assert_allclose(score_rows(log_q, labels, "squared"), expected, atol=1e-15)
    np.testing.assert_allclose(score_rows(log_q, labels, "norm"), np.sqrt(expected), atol=1e-15)


def test_only_the_squared_score_is_least_at_the_truth() -> None:
    true = np.array([0.6, 0.3, 0.1])
    candidates = np.linspace(-0.9, 3, 400)[:, None]
    proxies = np.stack([proxy_teacher(np.log(true)[None], coefficient)[0] for coefficient in candidates])

    def best(score: str) -> float:
        expected = sum(
            true[label] * score_rows(proxies, np.full(len(proxies), label), score)  # type: ignore[arg-type]
            for label in range(3)
        )
        return float(candidates[np.argmin(expected), 0])

    assert abs(best("squared")) < 0.01
    assert best("norm") > 1


def test_ranking_scores_all_on_some_rows_and_the_best_on_all() -> None:
    logits, labels = draw_rows(600, 4)
    candidates = draw_candidates(5, 16, upper=5.0, seed=0)
    ranking = rank_candidates(
        3 * logits, labels, candidates, score="squared", num_screening_rows=600, num_finalists=5, seed=0
    )
    scores = [score_rows(proxy_teacher(3 * logits, row), labels, "squared").mean() for row in candidates]
    np.testing.assert_allclose(ranking.row_scores.mean(axis=0)[:5], np.sort(scores)[:5])
    np.testing.assert_array_equal(ranking.best, candidates[np.argmin(scores)])
    assert len(ranking.coefficients) == 6
    assert not ranking.coefficients.any(axis=1).all()  # zero is among them though it is not among the best five
    assert (np.diff(ranking.row_scores.mean(axis=0)) >= 0).all()


@pytest.mark.parametrize("score", ["squared", "norm"])
def test_score_has_the_gradient_of_finite_differences(score: str) -> None:
    logits, labels = draw_rows(30, 4)
    coefficients = np.random.default_rng(0).random((4, 5)) * 2 - 0.15
    _, gradient = score_with_gradient(logits, labels, coefficients, score)  # type: ignore[arg-type]
    for index in np.ndindex(coefficients.shape):
        sides = []
        for sign in (1, -1):
            moved = coefficients.copy()
            moved[index] += sign * 1e-4
            sides.append(score_rows(proxy_teacher(logits, moved), labels, score).mean())  # type: ignore[arg-type]
        assert gradient[index] == pytest.approx((sides[0] - sides[1]) / 2e-4, abs=1e-7)


def test_descent_lowers_the_score_and_a_stronger_pull_stays_nearer() -> None:
    logits, labels = draw_rows(800, 4)
    shared = np.array([0.5, -0.25, 0, 0, 0])
    is_free = np.array([True, True, True, False])
    found = descend(2 * logits, labels, shared, score="squared", strengths=(1.0, 0.01), is_free=is_free, upper=5.0)
    scores = [score_with_gradient(2 * logits, labels, table, "squared")[0] for table in found]
    start = score_with_gradient(2 * logits, labels, np.tile(shared, (4, 1)), "squared")[0]
    assert start > scores[0] > scores[1]
    assert np.abs(found[0] - shared).max() < np.abs(found[1] - shared).max()
    for table in found:
        assert (table >= LOWEST).all()
        assert (table <= 5).all()
        np.testing.assert_array_equal(table[3], shared)


def test_halves_have_half_of_every_class() -> None:
    labels = np.repeat([0, 1, 2], [10, 7, 101])
    halves = split_halves(labels, seed=0)
    for label in range(3):
        ones, rows = halves[labels == label].sum(), (labels == label).sum()
        assert abs(2 * ones - rows) <= 1
    assert (halves != split_halves(labels, seed=1)).any()


# --- what is selected -------------------------------------------------------------------------------------------


def test_an_overconfident_teacher_is_flattened() -> None:
    logits, labels = draw_rows(2000, 5)
    found = select(2.5 * logits, labels)
    assert found.beats_zero
    assert found.verdict.startswith("Beats zero")
    teacher, scaled, proxy = found.scores
    assert proxy.gain.low > 0
    assert proxy.cross_fitted_score.mean < teacher.cross_fitted_score.mean
    assert (teacher.num_parameters, scaled.num_parameters, proxy.num_parameters) == (0, 1, 5)
    assert found.scaling_temperature == pytest.approx(2.5, rel=0.1)
    assert teacher.gain.mean == 0
    # It comes nearer to the truth, which the labels only hint at.
    coefficients = found.perturbation.for_rows(torch.from_numpy(logits)).numpy()
    true = np.exp(proxy_teacher(logits, np.zeros(5)))
    distances = [
        np.linalg.norm(np.exp(proxy_teacher(2.5 * logits, used)) - true, axis=1).mean()
        for used in (coefficients, np.zeros(5))
    ]
    assert distances[0] < 0.5 * distances[1]
    assert found.reliability[2].ece < 0.5 * found.reliability[0].ece


def test_a_teacher_that_tells_the_truth_keeps_zero_and_it_says_so() -> None:
    kept = 0
    for seed in range(10):
        found = select(*draw_rows(400, 4, seed), seed=seed)
        kept += not found.beats_zero
        if not found.beats_zero:
            assert found.verdict.startswith("Zero is kept")
            assert found.perturbation.coefficients == ((0.0,) * 5,)
            assert found.scores[2].gain.mean == 0
            assert found.scores[2].num_parameters == 0
    assert kept >= 9


def test_candidates_are_listed_with_their_gain_over_zero() -> None:
    logits, labels = draw_rows(1000, 4)
    found = select(3 * logits, labels)
    assert len(found.candidates) == 7
    (zero,) = [candidate for candidate in found.candidates if not any(candidate.coefficients)]
    assert zero.score.mean == pytest.approx(found.scores[0].score.mean)
    assert zero.gain.low == zero.gain.high == 0
    for candidate in found.candidates:
        assert candidate.gain.mean == pytest.approx(zero.score.mean - candidate.score.mean)
    assert found.candidates[0].coefficients == found.perturbation.coefficients[0]
    assert found.scores[2].score.mean == pytest.approx(found.candidates[0].score.mean)


def test_groups_by_confidence_are_treated_separately() -> None:
    logits, labels = draw_rows(4000, 4)
    confidence = np.exp(proxy_teacher(logits, np.zeros(1))).max(axis=1)
    is_sure = confidence > np.median(confidence)
    # Among the rows it is unsure of the labels are noise; the others are as the teacher says.
    labels = np.where(is_sure, labels, np.random.default_rng(0).integers(4, size=4000))
    found = select(logits, labels, scope="group", num_groups=2)
    assert found.perturbation.kind == "confidence"
    assert [group.num_rows for group in found.groups] == [2000, 2000]
    assert [group.is_kept for group in found.groups] == [True, False]
    assert any(found.perturbation.coefficients[0])
    assert not any(found.perturbation.coefficients[1])
    assert "in 1 of 2 groups (0)" in found.verdict
    assert found.scores[2].num_parameters == 5
    assert found.num_parameters == 10
    alone = select(logits[~is_sure], labels[~is_sure])
    assert found.groups[0].gain.mean == pytest.approx(alone.groups[0].gain.mean, rel=0.3)


def test_a_teacher_that_is_always_equally_sure_has_one_group() -> None:
    logits = np.log(0.9) * np.ones((300, 3))
    logits[:, 0] = 0.0
    found = select(logits, np.arange(300) % 3, scope="group", num_groups=4)
    assert found.perturbation.kind == "shared"
    assert len(found.groups) == 1


def test_groups_by_superclass_follow_the_teachers_answer() -> None:
    logits, labels = draw_rows(3000, 4)
    answer = logits.argmax(axis=1)
    logits = np.where((answer >= 2)[:, None], 3 * logits, logits)
    found = select(logits, labels, scope="group", group_by="superclass", class_groups=(0, 0, 1, 1))
    assert found.perturbation.kind == "superclass"
    assert found.perturbation.class_groups == (0, 0, 1, 1)
    assert [group.num_rows for group in found.groups] == [(answer < 2).sum(), (answer >= 2).sum()]
    assert found.groups[1].is_kept
    assert any(found.perturbation.coefficients[1])


def test_a_group_of_few_rows_keeps_zero() -> None:
    logits, labels = draw_rows(1000, 4)
    few = np.flatnonzero(logits.argmax(axis=1) == 3)
    rows = np.setdiff1d(np.arange(1000), few[20:])
    found = select(4 * logits[rows], labels[rows], scope="group", group_by="superclass", class_groups=(0, 0, 0, 1))
    assert [group.is_kept for group in found.groups] == [True, False]
    assert found.groups[1].num_rows == 20


def test_classes_get_their_own_coefficients_where_that_helps() -> None:
    logits, labels = draw_rows(4000, 4)
    biased = logits + np.array(
        [2.0, 0.0, 0.0, 0.0]
    )  # the teacher sees class 0 too often: shared coefficients cannot undo that
    found = select(biased, labels, scope="class")
    assert found.perturbation.kind == "class"
    assert len(found.perturbation.coefficients) == 4
    shared, *others = found.strengths
    assert shared.strength is None
    assert [other.strength for other in others] == [0.1, 0.01, 0.001]
    assert max(other.gain.mean for other in others) > shared.gain.mean + 0.01
    assert found.gain_over_scaling.low > 0
    assert found.scores[2].num_parameters == 20
    assert found.num_parameters == 25  # the shared ones it starts from as well


def test_classes_of_few_rows_keep_the_shared_coefficients() -> None:
    logits, labels = draw_rows(2000, 4)
    kept = np.sort(np.concatenate([np.flatnonzero(labels != 3), np.flatnonzero(labels == 3)[:49]]))
    found = select(2.5 * logits[kept], labels[kept], scope="class", strengths=(0.001,))
    assert found.perturbation.kind == "class"
    best = next(candidate for candidate in found.candidates)
    assert found.perturbation.coefficients[3] == best.coefficients
    assert found.perturbation.coefficients[0] != best.coefficients
    with pytest.raises(DataError, match=r"no class has the 5000 .* scope=shared"):
        select(logits, labels, scope="class", min_rows=5000)


def test_on_top_of_a_temperature_only_what_that_leaves_is_perturbed() -> None:
    logits, labels = draw_rows(1500, 4)
    found = select(3 * logits, labels, fit_temperature=True)
    assert found.perturbation.teacher_temperature == found.scaling_temperature == pytest.approx(3, rel=0.1)
    assert not found.beats_zero
    assert found.scores[2].cross_fitted_score == found.scores[1].cross_fitted_score
    assert found.scores[2].num_parameters == 1
    assert found.gain_over_scaling.mean == 0
    assert select(3 * logits, labels).perturbation.teacher_temperature == 1


def test_selection_is_deterministic_and_can_be_written() -> None:
    logits, labels = draw_rows(500, 4)
    found = select(2 * logits, labels, scope="group", num_groups=2)
    assert select(2 * logits, labels, scope="group", num_groups=2) == found
    assert select(2 * logits, labels, scope="group", num_groups=2, seed=1) != found
    assert Selection.model_validate_json(found.model_dump_json()) == found


@pytest.mark.parametrize(
    ("rows", "labels", "values", "error", "message"),
    [
        (99, np.zeros(99, int), {}, DataError, "99 validation rows are too few"),
        (200, np.zeros(199, int), {}, DataError, r"labels of shape \(199,\)"),
        (200, np.zeros(200), {}, DataError, "type float64"),
        (200, np.full(200, 4), {}, DataError, "run from 4 to 4 but the teacher has 4 classes"),
        (200, np.full(200, -1), {}, DataError, "run from -1"),
        (
            200,
            np.zeros(200, int),
            {"scope": "group", "group_by": "superclass", "class_groups": (0, 1)},
            ConfigError,
            "class_groups has 2 numbers but the teacher has 4",
        ),
    ],
)
def test_rows_that_cannot_select_are_refused(
    rows: int, labels: np.ndarray, values: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        select(np.zeros((rows, 4)), labels, **values)


def test_logits_that_are_not_finite_are_refused() -> None:
    logits = np.zeros((200, 4))
    logits[7, 1] = np.nan
    with pytest.raises(ModelError, match="row 7"):
        select(logits, np.zeros(200, int))


@pytest.mark.parametrize(
    "values",
    [
        {"scope": "rows"},
        {"order": 0},
        {"upper": 0},
        {"num_groups": 9},
        {"strengths": ()},
        {"strengths": (0.01, 0.1)},
        {"strengths": (0.1, 0.0)},
        {"class_groups": (0, 1)},
        {"scope": "group", "group_by": "superclass"},
        {"scope": "group", "group_by": "superclass", "class_groups": tuple(range(9))},
        {"scope": "group", "group_by": "superclass", "class_groups": (0, 2)},
    ],
)
def test_parameters_without_meaning_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        SelectionParams.model_validate(values)


# --- plots ------------------------------------------------------------------------------------------------------


def test_plots_show_every_candidate_and_predictor() -> None:
    logits, labels = draw_rows(600, 4)
    found = select(3 * logits, labels, scope="group", num_groups=3)
    panels = plot_candidates(found).axes
    assert [panel.get_title()[:7] for panel in panels if panel.get_title()] == ["group 0", "group 1", "group 2"]
    assert [len(panel.get_yticks()) for panel in panels[:3]] == [7, 7, 7]
    curves = plot_reliability(found)
    (legend,) = curves.legends
    names = [text.get_text().split(",")[0] for text in legend.get_texts()]
    assert names == ["perfectly calibrated", "teacher", "temperature-scaled", "proxy teacher"]
