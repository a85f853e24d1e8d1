"""What the newer losses stand: far logits, constant rows, ties, certainty, narrow types, any batch and order."""

from __future__ import annotations

import gc
import pickle
import re
import weakref
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from pipeline.errors import ConfigError
from pipeline.losses import LossParams, Objective, Signals
from pipeline.losses.batch import OncePerBatch
from pipeline.losses.cmkd import CMKDParams
from pipeline.losses.dist import DISTParams
from pipeline.losses.dkd import DKDParams
from pipeline.losses.levels import LevelsParams
from pipeline.losses.perturbation import Perturbation
from pipeline.losses.ptloss import PTLossParams, perturbed_kl

BY_CONFIDENCE = Perturbation(kind="confidence", edges=(0.5, 0.9), coefficients=((0.0, 0.1), (1.0, -0.5), (-1.0, 2.0)))
VARIANTS: list[LossParams] = [
    PTLossParams(ce_weight=0.5),
    PTLossParams(perturbation_from="p.json", selected=BY_CONFIDENCE, temperature=2.0),
    DISTParams(),
    DISTParams(intra_weight=0, temperature=1.0),
    CMKDParams(),
    CMKDParams(intra_weight=1.0, space="logit", difficulty="label", harder_gets="pearson"),
    CMKDParams(standardise=False, difficulty="margin", soft_rank_strength=0.1),
    DKDParams(),
    LevelsParams(),
    LevelsParams(level="label_smoothing"),
    LevelsParams(level="topk", num_kept=3),
]
every_variant = pytest.mark.parametrize(
    "params", VARIANTS, ids=lambda params: f"{params.name}-{VARIANTS.index(params)}"
)


def random_logits(rows: int, classes: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    student = 2 * torch.randn(rows, classes, generator=generator)
    teacher = 2 * torch.randn(rows, classes, generator=generator)
    return student.to(dtype).requires_grad_(), teacher.to(dtype), torch.randint(classes, (rows,), generator=generator)


def check_finite(params: LossParams, student: Tensor, teacher: Tensor, labels: Tensor) -> None:
    student, teacher = student.detach().clone().requires_grad_(), teacher.detach().clone().requires_grad_()
    total, terms = Objective(params)(Signals(student, labels, teacher))
    slopes = torch.autograd.grad(total, (student, teacher), allow_unused=True)
    assert total.isfinite()
    assert all(value.isfinite() for value in terms.values())
    assert slopes[0].isfinite().all()
    assert slopes[1] is None or not slopes[1].any()


@every_variant
@pytest.mark.parametrize("shape", [(1, 2), (1, 5), (6, 2), (6, 5), (2, 10_000)], ids=str)
def test_finite_for_all_shapes_and_far_logits(params: LossParams, shape: tuple[int, int]) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        check_finite(params, *random_logits(*shape, dtype))
    student, teacher, labels = random_logits(*shape)
    for scale in (1e4, -1e4):
        check_finite(params, scale * student.sign(), scale * teacher.sign(), labels)
        check_finite(params, scale * student, scale * teacher, labels)


@every_variant
def test_finite_for_constant_rows_ties_and_certain_teachers(params: LossParams) -> None:
    student, teacher, labels = random_logits(6, 5)
    constant = torch.zeros(6, 5)
    tied = torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0]).expand(6, 5)
    certain = 1e4 * torch.eye(5)[torch.arange(6) % 5]
    for unusual in (constant, constant + 3, tied, certain):
        check_finite(params, unusual, teacher, labels)
        check_finite(params, student, unusual, labels)
        check_finite(params, unusual, unusual, labels)


@every_variant
def test_order_of_rows_and_of_classes_does_not_matter(params: LossParams) -> None:
    student, teacher, labels = random_logits(8, 6, torch.float64)
    objective = Objective(params)
    total = objective(Signals(student, labels, teacher))[0].item()
    rows, classes = torch.randperm(8), torch.randperm(6)
    by_row = objective(Signals(student[rows], labels[rows], teacher[rows]))[0].item()
    assert by_row == pytest.approx(total, rel=1e-12)
    by_class = objective(Signals(student[:, classes], classes.argsort()[labels], teacher[:, classes]))[0].item()
    assert by_class == pytest.approx(total, rel=1e-12)
    if not params.couples_batch:
        twice = objective(Signals(student.repeat(2, 1), labels.repeat(2), teacher.repeat(2, 1)))[0].item()
        assert twice == pytest.approx(total, rel=1e-12)


@every_variant
def test_a_constant_added_to_the_teachers_rows_changes_nothing(params: LossParams) -> None:
    student, teacher, labels = random_logits(8, 6, torch.float64)
    objective = Objective(params)
    moved = teacher + torch.linspace(-5, 5, 8, dtype=torch.float64)[:, None]
    total = objective(Signals(student, labels, teacher))[0].item()
    assert objective(Signals(student, labels, moved))[0].item() == pytest.approx(total, rel=1e-10)


@every_variant
def test_narrow_logits_cost_little(params: LossParams) -> None:
    student, teacher, labels = random_logits(32, 10)
    objective = Objective(params)
    exact = objective(Signals(student, labels, teacher))[0].item()
    with torch.autocast("cpu", torch.bfloat16):
        total, _ = objective(Signals(student.bfloat16(), labels, teacher.bfloat16()))
    assert total.dtype == torch.float32
    assert total.item() == pytest.approx(exact, rel=1e-2)


@every_variant
def test_chunks_and_threads_change_no_more_than_rounding(params: LossParams, monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher, labels = random_logits(50, 7, torch.float64)

    def run() -> tuple[Tensor, Tensor]:
        total, _ = Objective(params)(Signals(student, labels, teacher))
        return total, torch.autograd.grad(total, student)[0]

    whole = run()
    monkeypatch.setattr("pipeline.losses.chunks._ELEMENTS_PER_THREAD", 30)
    for actual, expected in zip(run(), whole, strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-12, rtol=1e-12)


@every_variant
def test_parameters_survive_pickling_and_storage(params: LossParams) -> None:
    assert pickle.loads(pickle.dumps(params)) == params
    assert type(params).model_validate(params.model_dump(mode="json")) == params


# --- perturbation -----------------------------------------------------------------------------------------------


def test_coefficients_follow_the_row_or_the_class() -> None:
    teacher = torch.tensor([[0.0, 0.0, 0.0], [1.5, 0.0, 0.0], [0.0, 9.0, 0.0]])
    assert BY_CONFIDENCE.groups_of(teacher).tolist() == [0, 1, 2]
    assert BY_CONFIDENCE.for_rows(teacher).tolist() == [[[0.0, 0.10000000149011612]], [[1.0, -0.5]], [[-1.0, 2.0]]]
    by_superclass = Perturbation(
        kind="superclass", num_classes=3, class_groups=(0, 1, 0), coefficients=((0.5,), (-0.5,))
    )
    assert by_superclass.for_rows(teacher).tolist() == [[[0.5]], [[0.5]], [[-0.5]]]
    by_class = Perturbation(kind="class", num_classes=3, coefficients=((0.0,), (1.0,), (2.0,)))
    assert by_class.for_rows(teacher).shape == (3, 1)
    shared = Perturbation.shared((0.5, -0.25))
    assert shared.for_rows(teacher.double()).dtype == torch.float64
    assert (shared.order, shared.groups_of(teacher).tolist()) == (2, [0, 0, 0])
    with pytest.raises(ConfigError, match="made for 3 classes but the teacher has 4"):
        by_class.for_rows(torch.zeros(1, 4))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"coefficients": ((-1.01,),)}, r"coefficient 1 is -1.01, expected a finite number of at least -1/1"),
        ({"coefficients": ((0.0, 0.0, -0.34),)}, r"coefficient 3 is -0.34, expected a finite number of at least -1/3"),
        ({"coefficients": ((float("nan"),),)}, "expected a finite number"),
        ({"coefficients": ((),)}, "at least one row"),
        ({"coefficients": ((1.0,), (1.0, 2.0)), "kind": "confidence", "edges": (0.5,)}, "the same number"),
        ({"coefficients": ((1.0,),), "edges": (0.5,)}, "edges: expected with kind 'confidence'"),
        ({"coefficients": ((1.0,),) * 3, "kind": "confidence", "edges": (0.9, 0.5)}, "increasing"),
        ({"coefficients": ((1.0,),) * 2, "kind": "class", "num_classes": 3}, "2 rows, expected 3"),
        ({"coefficients": ((1.0,),), "kind": "class"}, "num_classes: expected"),
        (
            {"coefficients": ((1.0,),) * 2, "kind": "superclass", "num_classes": 3, "class_groups": (0, 2, 2)},
            "without gaps",
        ),
        (
            {
                "coefficients": ((1.0,),) * 9,
                "kind": "confidence",
                "edges": tuple(i / 10 for i in range(1, 9)),
            },
            "9 groups, expected at most 8",
        ),
    ],
)
def test_perturbations_without_meaning_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(message) if "coefficient " not in message else message):
        Perturbation.model_validate(values)


def test_a_file_of_coefficients_is_read_with_the_configuration(tmp_path: Path) -> None:
    path = tmp_path / "perturbation.json"
    BY_CONFIDENCE.write(path)
    assert [file.name for file in tmp_path.iterdir()] == ["perturbation.json"]
    params = PTLossParams(perturbation_from=str(path))
    path.unlink()
    assert params.selected == BY_CONFIDENCE
    assert PTLossParams.model_validate(params.model_dump(mode="json")) == params
    student, teacher, labels = random_logits(5, 4)
    total, _ = Objective(params)(Signals(student, labels, teacher))
    expected = perturbed_kl(student, teacher, perturbation=BY_CONFIDENCE.for_rows(teacher))
    assert total.item() == expected.item()
    with pytest.raises(ConfigError, match=r"perturbation.json cannot be read \(No such file"):
        PTLossParams(perturbation_from=str(path))
    path.write_text('{"coefficients": [[-2]]}')
    with pytest.raises(ConfigError, match=r"coefficient 1 is -2.*select-perturbation wrote"):
        PTLossParams(perturbation_from=str(path))
    with pytest.raises(ValidationError, match="are both set"):
        PTLossParams(perturbation=(0.5,), perturbation_from="p.json", selected=BY_CONFIDENCE)
    for perturbation in ((), (-1.5,)):
        with pytest.raises(ValidationError):
            PTLossParams(perturbation=perturbation)


# --- what a loss needs, and what its terms share ----------------------------------------------------------------


def test_levels_need_what_they_read() -> None:
    assert LevelsParams(level="label_smoothing").needs == frozenset()
    assert LevelsParams(level="partial_and_similarity").needs == {"full", "last_layer"}
    assert not LevelsParams(level="topk", ce_weight=0).needs_labels
    assert LevelsParams(ce_weight=0).needs_labels


def test_terms_share_their_work_until_the_batch_is_gone() -> None:
    calls = []
    once = OncePerBatch(lambda signals: calls.append(signals.student_logits) or torch.ones(1))
    first = Signals(torch.zeros(1, 2))
    result = once(first)
    assert once(first) is result
    once(second := Signals(torch.zeros(1, 2)))
    assert len(calls) == 2
    watched = weakref.ref(once(second))
    del result
    del second
    gc.collect()
    assert watched() is None
