"""Every loss against hand numbers, closed forms, limits and an independent NumPy version."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from typing import Any

import beartype
import jaxtyping
import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

import pipeline.losses
from pipeline.errors import ConfigError, ModelError
from pipeline.losses import LOSSES, LossParams, Objective, Signals, Term
from pipeline.losses import cross_entropy as ce_module
from pipeline.losses import kd as kd_module
from pipeline.losses import logit_mse as mse_module
from pipeline.losses.cross_entropy import CrossEntropyParams
from pipeline.losses.kd import KDParams
from pipeline.losses.logit_mse import LogitMSEParams

STUDENT = [[1.0, 2.0, 0.5, -1.0], [0.2, -0.4, 1.5, 0.3]]
TEACHER = [[2.0, 1.0, 0.0, -2.0], [0.5, -1.0, 3.0, 0.0]]
LABELS = torch.tensor([0, 2])


@pytest.fixture(autouse=True)
def _execute_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs every loss function with its shape annotations checked, wherever it is called from."""
    names = [info.name for info in pkgutil.iter_modules(pipeline.losses.__path__)]
    modules = [importlib.import_module(f"pipeline.losses.{name}") for name in names]
    checked = {
        function: jaxtyping.jaxtyped(function, typechecker=beartype.beartype)
        for module in modules
        for function in vars(module).values()
        if inspect.isfunction(function) and function.__module__ == module.__name__
    }
    for module in modules:
        for name, value in list(vars(module).items()):
            if inspect.isfunction(value) and value in checked:
                monkeypatch.setattr(module, name, checked[value])


@pytest.fixture
def student() -> Tensor:
    return torch.tensor(STUDENT, dtype=torch.float64, requires_grad=True)


@pytest.fixture
def teacher() -> Tensor:
    return torch.tensor(TEACHER, dtype=torch.float64, requires_grad=True)


def gradient(total: Tensor, student: Tensor) -> Tensor:
    (result,) = torch.autograd.grad(total, student)
    return result


def random_logits(rows: int = 6, classes: int = 5, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    student = (2 * torch.randn(rows, classes, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()
    teacher = (2 * torch.randn(rows, classes, generator=generator, dtype=torch.float64)).to(dtype)
    return student, teacher, torch.randint(classes, (rows,), generator=generator)


# --- hand numbers and closed forms ------------------------------------------------------------------------------


def test_cross_entropy_has_the_fixtures_value_and_gradient(student: Tensor) -> None:
    loss = ce_module.cross_entropy(student, LABELS)
    assert loss.item() == pytest.approx(1.0197099179441207, abs=1e-13)
    expected = (student.softmax(1) - torch.eye(4, dtype=torch.float64)[LABELS]) / 2
    torch.testing.assert_close(gradient(loss, student), expected, atol=1e-13, rtol=0)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
def test_label_smoothing_is_cross_entropy_with_mixed_targets(student: Tensor, label_smoothing: float) -> None:
    loss = ce_module.cross_entropy(student, LABELS, label_smoothing=label_smoothing)
    target = (1 - label_smoothing) * np.eye(4)[LABELS.numpy()] + label_smoothing / 4
    logits = np.array(STUDENT)
    log_probabilities = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    assert loss.item() == pytest.approx(-(target * log_probabilities).sum(1).mean(), abs=1e-13)


def test_label_smoothing_of_one_is_distillation_from_a_uniform_teacher(student: Tensor) -> None:
    uniform = torch.zeros_like(student)
    smooth = gradient(ce_module.cross_entropy(student, LABELS, label_smoothing=1.0), student)
    distilled = gradient(kd_module.kl_divergence(student, uniform, temperature=1.0), student)
    torch.testing.assert_close(smooth, distilled, atol=1e-13, rtol=0)


def test_a_label_outside_the_classes_is_an_error_and_never_ignored(student: Tensor) -> None:
    for label in (-100, -1, 4):
        with pytest.raises((IndexError, RuntimeError)):
            ce_module.cross_entropy(student, torch.tensor([0, label]))


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_cross_entropy_with_mixed_labels_is_that_with_mixed_targets(student: Tensor, label_smoothing: float) -> None:
    partners, weights = torch.tensor([3, 2]), torch.tensor([0.7, 0.4])
    loss = ce_module.cross_entropy(
        student, LABELS, label_smoothing=label_smoothing, partner_labels=partners, label_weights=weights
    )
    shares = weights.numpy().astype(np.float64)[:, None]
    mixed = shares * np.eye(4)[LABELS.numpy()] + (1 - shares) * np.eye(4)[partners.numpy()]
    target = (1 - label_smoothing) * mixed + label_smoothing / 4
    logits = np.array(STUDENT)
    log_probabilities = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    assert loss.item() == pytest.approx(-(target * log_probabilities).sum(1).mean(), abs=1e-13)
    expected = (student.softmax(1).detach() - torch.from_numpy(target)) / 2
    torch.testing.assert_close(gradient(loss, student), expected, atol=1e-13, rtol=0)


def test_partners_and_weights_come_together(student: Tensor) -> None:
    with pytest.raises(ValueError, match="given together"):
        ce_module.cross_entropy(student, LABELS, partner_labels=LABELS)
    with pytest.raises(ValueError, match="given together"):
        ce_module.cross_entropy(student, LABELS, label_weights=torch.ones(2))


@pytest.mark.parametrize(
    ("temperature", "expected"),
    [(1.0, 0.32086110011782953), (2.0, 0.3866031566511766), (4.0, 0.37834222908955456), (20.0, 0.34210492466495385)],
)
def test_kl_divergence_has_the_fixtures_values(
    student: Tensor, teacher: Tensor, temperature: float, expected: float
) -> None:
    loss = kd_module.kl_divergence(student, teacher, temperature=temperature)
    assert loss.item() == pytest.approx(expected, abs=1e-13)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
def test_kl_divergence_has_the_closed_form_gradient(student: Tensor, teacher: Tensor, temperature: float) -> None:
    result = gradient(kd_module.kl_divergence(student, teacher, temperature=temperature), student)
    soft = (student / temperature).softmax(1) - (teacher / temperature).softmax(1)
    torch.testing.assert_close(result, temperature * soft.detach() / 2, atol=1e-13, rtol=0)
    torch.testing.assert_close(result.sum(1), torch.zeros(2, dtype=torch.float64), atol=1e-13, rtol=0)


def test_kd_has_the_fixtures_total_and_gradient(student: Tensor, teacher: Tensor) -> None:
    total, terms = Objective(KDParams())(Signals(student, LABELS, teacher))
    assert total.item() == pytest.approx(0.44247899797501117, abs=1e-13)
    assert {name: value.item() for name, value in terms.items()} == {
        "kd": pytest.approx(0.37834222908955456, abs=1e-13),
        "ce": pytest.approx(1.0197099179441207, abs=1e-13),
    }
    expected = [
        [-0.2155044638, 0.1338734601, 0.0312709243, 0.0503600794],
        [0.0238624859, 0.0884084284, -0.1952938753, 0.0830229611],
    ]
    torch.testing.assert_close(gradient(total, student), torch.tensor(expected, dtype=torch.float64), atol=1e-9, rtol=0)


@pytest.mark.parametrize("temperature", [1e3, 1e4])
def test_kl_divergence_becomes_the_centred_mse_at_high_temperature(
    student: Tensor, teacher: Tensor, temperature: float
) -> None:
    limit = [[-0.34375, 0.15625, 0.03125, 0.15625], [-0.01875, 0.20625, -0.31875, 0.13125]]
    centred = mse_module.centred_logit_mse(student, teacher)
    assert centred.item() == pytest.approx((0.3359375 + 0.3234375) / 2, abs=1e-13)
    exact = 2 * gradient(centred, student)
    torch.testing.assert_close(exact, torch.tensor(limit, dtype=torch.float64), atol=1e-12, rtol=0)

    soft = kd_module.kl_divergence(student, teacher, temperature=temperature)
    assert soft.item() == pytest.approx(centred.item(), rel=3 / temperature)
    deviation = (2 * gradient(soft, student) - exact).abs().max().item()
    assert deviation == pytest.approx(0.34 / temperature, rel=0.02)


def test_kl_divergence_gradient_at_low_temperature_compares_the_top_classes(student: Tensor, teacher: Tensor) -> None:
    temperature = 0.02
    result = gradient(kd_module.kl_divergence(student, teacher, temperature=temperature), student)
    expected = torch.tensor([-1.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(2 * result[0] / temperature, expected, atol=1e-9, rtol=0)


def test_logit_mse_is_the_mean_over_batch_and_classes(student: Tensor, teacher: Tensor) -> None:
    loss = mse_module.logit_mse(student, teacher)
    assert loss.item() == pytest.approx(0.755, abs=1e-13)
    torch.testing.assert_close(gradient(loss, student), (2 * (student - teacher) / 8).detach(), atol=1e-13, rtol=0)


def test_only_the_plain_logit_mse_sees_the_offset_of_a_row(student: Tensor, teacher: Tensor) -> None:
    moved = teacher + torch.tensor([[5.0], [-3.0]])
    assert mse_module.centred_logit_mse(student, moved).item() == pytest.approx(
        mse_module.centred_logit_mse(student, teacher).item(), abs=1e-12
    )
    assert mse_module.logit_mse(student, moved).item() > mse_module.logit_mse(student, teacher).item() + 1


def numpy_kd(student: np.ndarray, teacher: np.ndarray, temperature: float) -> float:
    p_t = np.exp(teacher / temperature) / np.exp(teacher / temperature).sum(1, keepdims=True)
    p_s = np.exp(student / temperature) / np.exp(student / temperature).sum(1, keepdims=True)
    return float(temperature**2 * (p_t * np.log(p_t / p_s)).sum(1).mean())


def numpy_ce(student: np.ndarray, labels: np.ndarray) -> float:
    return float(-np.log(np.exp(student) / np.exp(student).sum(1, keepdims=True))[range(len(labels)), labels].mean())


ORACLES: list[tuple[LossParams, Callable[[np.ndarray, np.ndarray, np.ndarray], float]]] = [
    (CrossEntropyParams(), lambda s, t, y: numpy_ce(s, y)),
    (KDParams(), lambda s, t, y: 0.9 * numpy_kd(s, t, 4.0) + 0.1 * numpy_ce(s, y)),
    (
        KDParams(temperature=1.5, kd_weight=2.0, ce_weight=0.5),
        lambda s, t, y: 2 * numpy_kd(s, t, 1.5) + 0.5 * numpy_ce(s, y),
    ),
    (LogitMSEParams(), lambda s, t, y: float(((s - t) ** 2).mean())),
    (
        LogitMSEParams(centred=True, ce_weight=1.0),
        lambda s, t, y: float((s - t).var(axis=1).mean() / 2) + numpy_ce(s, y),
    ),
]


@pytest.mark.parametrize(("params", "oracle"), ORACLES, ids=[repr(params) for params, _ in ORACLES])
def test_totals_agree_with_numpy(params: LossParams, oracle: Callable[..., float]) -> None:
    student, teacher, labels = random_logits()
    total, _ = Objective(params)(Signals(student, labels, teacher))
    assert total.item() == pytest.approx(oracle(student.detach().numpy(), teacher.numpy(), labels.numpy()), rel=1e-12)
    assert torch.autograd.gradcheck(lambda logits: Objective(params)(Signals(logits, labels, teacher))[0], (student,))


# --- what holds for every registered loss -----------------------------------------------------------------------


every_loss = pytest.mark.parametrize(
    "params", [params() for params in LOSSES.entries().values()], ids=lambda params: params.name
)


@every_loss
def test_every_loss_is_finite_far_out_and_gives_the_teacher_no_gradient(params: LossParams) -> None:
    objective = Objective(params)
    for scale in (1.0, 1e4):
        student, teacher, labels = random_logits(dtype=torch.float32)
        student = (student.detach().sign() * scale).requires_grad_()
        teacher = (teacher.sign() * scale).requires_grad_()
        total, terms = objective(Signals(student, labels, teacher))
        grads = torch.autograd.grad(total, (student, teacher), allow_unused=True)
        assert total.isfinite()
        assert grads[0].isfinite().all()
        assert grads[1] is None or not grads[1].any()
        assert not any(value.requires_grad for value in terms.values())


@every_loss
def test_every_loss_computes_bf16_logits_in_float32(params: LossParams) -> None:
    student, teacher, labels = random_logits(32, 10, torch.float32)
    objective = Objective(params)
    exact, _ = objective(Signals(student, labels, teacher))
    with torch.autocast("cpu", torch.bfloat16):
        total, terms = objective(Signals(student.bfloat16(), labels, teacher.bfloat16()))
    assert total.dtype == torch.float32
    assert all(value.dtype == torch.float32 for value in terms.values())
    assert total.item() == pytest.approx(exact.item(), rel=1e-2)
    total.backward()
    assert student.grad is not None
    assert student.grad.isfinite().all()


@every_loss
def test_every_loss_is_a_batch_mean_that_ignores_the_order_of_rows(params: LossParams) -> None:
    student, teacher, labels = random_logits(8, 5)
    objective = Objective(params)
    total = objective(Signals(student, labels, teacher))[0].item()
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    shuffled = objective(Signals(student[order], labels[order], teacher[order]))[0].item()
    assert shuffled == pytest.approx(total, rel=1e-12)
    if not params.couples_batch:
        twice = objective(Signals(student.repeat(2, 1), labels.repeat(2), teacher.repeat(2, 1)))[0].item()
        assert twice == pytest.approx(total, rel=1e-12)


@every_loss
def test_every_loss_declares_exactly_what_it_needs(params: LossParams) -> None:
    student, teacher, labels = random_logits()
    objective = Objective(params)
    if params.needs_labels:
        with pytest.raises(ConfigError, match="needs labels but the batch has none"):
            objective(Signals(student, None, teacher))
    if params.needs_teacher:
        with pytest.raises(ConfigError, match="needs the teacher's logits but the batch has none"):
            objective(Signals(student, labels, None))
    needed = Signals(student, labels if params.needs_labels else None, teacher if params.needs_teacher else None)
    assert objective(needed)[0].item() == objective(Signals(student, labels, teacher))[0].item()


@every_loss
def test_every_loss_shares_itself_out_between_mixed_labels(params: LossParams) -> None:
    student, teacher, labels = random_logits()
    partners = (labels + 2) % 5
    objective = Objective(params)
    if params.one_label_terms:
        with pytest.raises(ConfigError, match="takes one label a row"):
            objective(Signals(student, labels, teacher, partners, torch.full((6,), 0.5)))
        return

    def total(*label_signals: Tensor) -> float:
        own, *pairs = label_signals
        return objective(Signals(student, own, teacher, *pairs))[0].item()

    for share in (0.0, 0.25, 1.0):
        mixed = total(labels, partners, torch.full((6,), share))
        assert mixed == pytest.approx(share * total(labels) + (1 - share) * total(partners), rel=1e-12)


@every_loss
def test_every_loss_refuses_logits_of_other_classes(params: LossParams) -> None:
    student, teacher, labels = random_logits()
    with pytest.raises(ModelError, match=r"\(6, 5\).*\(6, 4\).*same classes"):
        Objective(params)(Signals(student, labels, teacher[:, :4]))


@every_loss
def test_every_loss_has_terms_of_distinct_names(params: LossParams) -> None:
    names = [term.name for term in params.terms()]
    assert len(set(names)) == len(names) > 0


class GivenTerms(LossParams):
    """A loss of any terms."""

    name: str = "given"
    given: tuple[Any, ...]

    def terms(self) -> tuple[Term, ...]:
        return self.given


def objective_of(*terms: Term) -> Objective:
    return Objective(GivenTerms(given=terms))


# --- objectives and parameters ----------------------------------------------------------------------------------


def test_a_term_of_weight_zero_is_not_computed(student: Tensor, teacher: Tensor) -> None:
    def fails(signals: Signals) -> Tensor:
        raise AssertionError("computed")

    used = Term("sum", 2.0, lambda signals: signals.student_logits.sum())
    total, terms = objective_of(Term("unused", 0.0, fails), used)(Signals(student))
    assert terms.keys() == {"sum"}
    assert total.item() == pytest.approx(2 * terms["sum"].item())


def test_distillation_without_labels_needs_none(student: Tensor, teacher: Tensor) -> None:
    params = KDParams(ce_weight=0)
    assert not params.needs_labels
    total, terms = Objective(params)(Signals(student, None, teacher))
    assert terms.keys() == {"kd"}
    assert total.item() == pytest.approx(0.9 * 0.37834222908955456)


def test_a_term_of_one_label_a_row_refuses_mixed_ones(student: Tensor) -> None:
    own = Term("rank", 1.0, lambda signals: signals.labels_for("rank").double().mean(), labels="one")
    assert objective_of(own)(Signals(student, LABELS))[0].item() == 1.0
    mixed = Signals(student, LABELS, None, LABELS, torch.ones(2))
    with pytest.raises(ConfigError, match=r"loss term 'rank' takes one label a row, .* set data.augment.mixup=0 and"):
        objective_of(own)(mixed)


@pytest.mark.parametrize(
    ("params", "values"),
    [
        (KDParams, {"temperature": 0}),
        (KDParams, {"temperature": float("inf")}),
        (KDParams, {"kd_weight": -0.1}),
        (KDParams, {"kd_weight": 0, "ce_weight": 0}),
        (KDParams, {"alpha": 0.5}),
        (LogitMSEParams, {"kd_weight": 0}),
        (CrossEntropyParams, {"label_smoothing": 1.1}),
    ],
)
def test_parameters_without_meaning_are_refused(params: type[LossParams], values: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        params.model_validate(values)


def test_shape_annotations_are_executed(student: Tensor) -> None:
    with pytest.raises(jaxtyping.TypeCheckError):
        kd_module.kl_divergence(student, student[:, :3], temperature=1.0)
