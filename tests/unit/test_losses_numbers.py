"""Every newer loss against hand numbers, closed forms, limits and an independent NumPy version."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.losses import Objective, Signals
from pipeline.losses.cmkd import CMKDParams, soft_spearman, teacher_difficulty
from pipeline.losses.correlation import PUBLISHED_FLOOR, pearson, softmax_correlations
from pipeline.losses.dist import DISTParams, dist_inter, dist_intra
from pipeline.losses.dkd import DKDParams, nontarget_kl, target_kl
from pipeline.losses.kd import kl_divergence
from pipeline.losses.levels import (
    class_similarity_targets,
    partial_teacher_targets,
    smoothed_label_targets,
    soft_target_kl,
    topk_targets,
)
from pipeline.losses.ptloss import perturbed_kl
from pipeline.losses.standardise import standardise

STUDENT = torch.tensor([[1.0, 2.0, 0.5, -1.0], [0.2, -0.4, 1.5, 0.3], [0.0, 1.0, -1.0, 0.5]], dtype=torch.float64)
TEACHER = torch.tensor([[2.0, 1.0, 0.0, -2.0], [0.5, -1.0, 3.0, 0.0], [1.0, 0.0, -2.0, 2.0]], dtype=torch.float64)
LABELS = torch.tensor([0, 2])
PUBLISHED = {"floor": PUBLISHED_FLOOR, "additive": True}


@pytest.fixture
def student() -> Tensor:
    return STUDENT[:2].clone().requires_grad_()


@pytest.fixture
def teacher() -> Tensor:
    return TEACHER[:2].clone()


def row(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def gradient(total: Tensor, student: Tensor) -> Tensor:
    (result,) = torch.autograd.grad(total, student, retain_graph=True)
    return result


def close(actual: Tensor, expected: Tensor, atol: float = 1e-9) -> None:
    torch.testing.assert_close(actual, expected.to(actual.dtype), atol=atol, rtol=0)


def random_logits(rows: int = 6, classes: int = 5, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student = 2 * torch.randn(rows, classes, generator=generator, dtype=torch.float64)
    teacher = 2 * torch.randn(rows, classes, generator=generator, dtype=torch.float64)
    return student.requires_grad_(), teacher, torch.randint(classes, (rows,), generator=generator)


# --- PTLoss -----------------------------------------------------------------------------------------------------


def test_perturbed_kl_has_the_fixtures_values_and_gradients(student: Tensor, teacher: Tensor) -> None:
    shared = row(0.5, -0.25, 0, 0, 0)
    loss = perturbed_kl(student, teacher, perturbation=shared)
    assert loss.item() == pytest.approx(0.518299847298068, abs=1e-13)
    expected = torch.stack(
        [
            row(-0.4355872493, 0.3607131614, 0.0546851384, 0.0201889495),
            row(0.1092913218, 0.0836529382, -0.3496412797, 0.1566970197),
        ]
    )
    close(2 * gradient(loss, student), expected)

    by_class = torch.zeros(4, 2, dtype=torch.float64)
    by_class[0], by_class[2] = row(1, 0.5), row(-0.5, 0.2)
    loss = perturbed_kl(student, teacher, perturbation=by_class)
    assert loss.item() == pytest.approx(0.628888976980439, abs=1e-13)
    expected = torch.stack(
        [
            row(-0.6364493566, 0.5260198009, 0.0842405719, 0.0261889838),
            row(0.0427807322, 0.0581299186, -0.2067509794, 0.1058403286),
        ]
    )
    close(2 * gradient(loss, student), expected)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_perturbed_kl_without_perturbation_is_the_kl_divergence(temperature: float) -> None:
    student, teacher, _ = random_logits(40, 7)
    ours = perturbed_kl(student, teacher, perturbation=torch.zeros(5), temperature=temperature)
    plain = kl_divergence(student, teacher, temperature=temperature)
    assert ours.item() == pytest.approx(plain.item(), abs=1e-12)
    close(gradient(ours, student), gradient(plain, student), 1e-12)


def test_perturbed_kl_of_a_certain_teacher_is_poly_loss() -> None:
    student, _, labels = random_logits()
    certain = torch.full_like(student, -1e4).scatter(1, labels[:, None], 1e4).detach()
    loss = perturbed_kl(student, certain, perturbation=row(0.7))
    p = student.softmax(1).gather(1, labels[:, None])
    assert loss.item() == pytest.approx((-p.log() + 0.7 * (1 - p)).mean().item(), abs=1e-12)


@pytest.mark.parametrize("gamma", [1, 2, 5])
def test_perturbed_kl_of_high_order_is_the_focal_loss(gamma: int) -> None:
    coefficients = row(*(-1 / m if m <= gamma else gamma / (m * (m - gamma)) for m in range(1, 4001)))
    p = torch.tensor([0.002, 0.1, 0.5, 0.9], dtype=torch.float64)
    logits = torch.stack([p.log(), (1 - p).log()], dim=1)
    certain = row(1e4, -1e4).expand(4, 2)
    loss = perturbed_kl(logits, certain, perturbation=coefficients)
    assert loss.item() == pytest.approx((-((1 - p) ** gamma) * p.log()).mean().item(), abs=1e-6)


def test_perturbed_kl_by_row_is_each_row_with_its_own_coefficients() -> None:
    student, teacher, _ = random_logits(3, 4)
    by_row = torch.rand(3, 1, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    alone = [perturbed_kl(student[i : i + 1], teacher[i : i + 1], perturbation=by_row[i, 0]) for i in range(3)]
    together = perturbed_kl(student, teacher, perturbation=by_row)
    assert together.item() == pytest.approx(torch.stack(alone).mean().item(), abs=1e-13)
    spread = perturbed_kl(student, teacher, perturbation=by_row.expand(3, 4, 3))
    assert spread.item() == pytest.approx(together.item(), abs=1e-13)
    with pytest.raises(ValueError, match=r"perturbation of shape \(2, 3\), expected \(M,\), \(4, M\)"):
        perturbed_kl(student, teacher, perturbation=by_row[:2, 0])


# --- correlations, DIST, CMKD -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("temperature", "total", "inter", "intra"),
    [
        (1.0, 0.5942579041344032, 0.529190290130237, 0.06506761400416616),
        (4.0, 4.980724208333752, 16 * 0.25974740736144863, 16 * 0.05154785565941089),
    ],
)
def test_dist_has_the_published_codes_numbers(temperature: float, total: float, inter: float, intra: float) -> None:
    within_rows = dist_inter(STUDENT, TEACHER, temperature=temperature, **PUBLISHED)
    within_classes = dist_intra(STUDENT, TEACHER, temperature=temperature, **PUBLISHED)
    assert within_rows.item() == pytest.approx(inter, abs=1e-12)
    assert within_classes.item() == pytest.approx(intra, abs=1e-12)
    assert (within_rows + within_classes).item() == pytest.approx(total, abs=1e-12)
    params = DISTParams(temperature=temperature, ce_weight=0, published_floor=True)
    assert Objective(params)(Signals(STUDENT, None, TEACHER))[0].item() == pytest.approx(2 * total)


def test_softmax_correlations_have_the_fixtures_values_and_are_those_of_the_probabilities() -> None:
    rows, columns = softmax_correlations(STUDENT, TEACHER, temperature=1.0, **PUBLISHED)
    assert rows is not None
    assert columns is not None
    close(rows, row(0.2623661026, 0.9909204518, 0.1591425752))
    close(columns, row(0.9988106231, 0.8904451, 0.9988630996, 0.8516107213))
    student, teacher, _ = random_logits(9, 6)
    p, q = (student / 3).softmax(1), (teacher / 3).softmax(1)
    for actual, expected in zip(
        softmax_correlations(student, teacher, temperature=3.0), (pearson(p, q), pearson(p.T, q.T)), strict=True
    ):
        assert actual is not None
        close(actual, expected, 1e-12)
        weights = torch.arange(len(actual), dtype=torch.float64)
        close(gradient((actual * weights).sum(), student), gradient((expected * weights).sum(), student), 1e-12)


def test_pearson_ignores_scale_and_offset_and_its_gradient_is_centred() -> None:
    u, v, _ = random_logits(4, 6)
    rho = pearson(u, v, floor=1e-30)
    expected = [np.corrcoef(a, b)[0, 1] for a, b in zip(u.detach().numpy(), v.numpy(), strict=True)]
    close(rho, torch.tensor(expected), 1e-12)
    close(pearson(3 * u + 5, 0.1 * v - 2, floor=1e-30), rho, 1e-12)
    close(pearson(-u, v, floor=1e-30), -rho, 1e-12)
    slope = gradient(rho.sum(), u)
    close(slope.sum(1), torch.zeros(4), 1e-12)
    close((slope * u.detach()).sum(1), torch.zeros(4), 1e-12)


def test_dist_of_equal_logits_is_the_floors_share() -> None:
    logits = random_logits(32, 100)[1]
    p = (logits / 4).softmax(1)
    spread = (p - p.mean(1, keepdim=True)).square().sum(1)
    loss = dist_inter(logits, logits, temperature=4.0, **PUBLISHED)
    assert loss.item() == pytest.approx((16 * 1e-8 / (spread + 1e-8)).mean().item(), rel=1e-6)


def test_the_gradient_of_a_constant_row_is_finite_and_bounded_by_the_floor(teacher: Tensor) -> None:
    constant = torch.zeros(2, 4, dtype=torch.float64, requires_grad=True)
    assert gradient(pearson(constant, teacher).sum(), constant).abs().max() <= 1e4
    for near in (0.0, 1e-6, 1e-4):
        nearly = (near * row(1, -1, 0.5, -0.5)).expand(2, 4).clone().requires_grad_()
        assert gradient(dist_inter(nearly, teacher, temperature=1.0), nearly).norm() <= 1e4 / 4 + 1


def test_dist_has_no_gradient_in_batches_of_two(student: Tensor, teacher: Tensor) -> None:
    loss = dist_intra(student, teacher, temperature=1.0, floor=1e-30)
    close(gradient(loss, student), torch.zeros(2, 4), 1e-12)
    one = dist_intra(student[:1], teacher[:1], temperature=1.0)
    assert one.item() == 1
    assert not gradient(one, student).any()


@pytest.mark.parametrize(("strength", "expected"), [(1.0, 0.13593557606316234), (0.25, 0.13242864986364128)])
def test_cmkd_has_the_fixtures_values(student: Tensor, teacher: Tensor, strength: float, expected: float) -> None:
    params = CMKDParams(soft_rank_strength=strength, ce_weight=0)
    total, terms = Objective(params)(Signals(student, None, teacher))
    # The numbers are of the published floor, which takes another millionth of a correlation than ours.
    assert total.item() / 2 == pytest.approx(expected, abs=1e-6)
    assert terms.keys() == {"pearson", "spearman", "hard_rows", "linear_rows"}
    if strength == 0.25:
        default = Objective(CMKDParams(ce_weight=0))(Signals(student, None, teacher))[0]
        assert default.item() == total.item()


def test_cmkds_parts_have_the_fixtures_values(student: Tensor, teacher: Tensor) -> None:
    close(teacher_difficulty(teacher, "entropy"), row(0.6402272085, 0.3692548855))
    p = teacher.softmax(1)
    close(teacher_difficulty(teacher, "label", LABELS), 1 - p.gather(1, LABELS[:, None])[:, 0], 1e-12)
    close(teacher_difficulty(teacher, "margin"), 1 - (p.max(1).values - p.topk(2).values[:, 1]), 1e-12)
    close(teacher_difficulty(teacher, "constant"), row(0.5, 0.5))
    scaled, reference = standardise(student), standardise(teacher)
    rows, _ = softmax_correlations(scaled, reference, temperature=4.0, **PUBLISHED)
    assert rows is not None
    close(rows, row(0.759648732, 0.9884565613))
    close(soft_spearman(scaled, reference, strength=1.0)[0], row(0.7745966692, 0.9084399583), 1e-8)
    close(soft_spearman(scaled, reference)[0], row(0.8, 0.8833893727), 1e-8)


def test_cmkds_options_exchange_roles_and_shares(student: Tensor, teacher: Tensor) -> None:
    def values(**options: object) -> dict[str, Tensor]:
        return Objective(CMKDParams(ce_weight=0, **options))(Signals(student, LABELS, teacher))[1]

    normal, flipped, even = values(), values(harder_gets="pearson"), values(difficulty="constant")
    for name in ("pearson", "spearman"):
        assert (normal[name] + flipped[name]).item() == pytest.approx(2 * even[name].item(), abs=1e-12)
    scaled, reference = standardise(student), standardise(teacher)
    in_logits = values(space="logit", difficulty="constant", intra_weight=1.0)
    assert in_logits["pearson"].item() == pytest.approx(0.5 * (1 - pearson(scaled, reference)).mean().item())
    assert in_logits["intra"].item() == pytest.approx((1 - pearson(scaled.T, reference.T)).mean().item())
    assert not CMKDParams().couples_batch
    assert CMKDParams(intra_weight=0.1).couples_batch


# --- DKD and standardised logits --------------------------------------------------------------------------------


def test_dkd_has_the_fixtures_values_and_gradient(student: Tensor, teacher: Tensor) -> None:
    for index, (target, nontarget) in enumerate([(0.4268476163, 0.0220473101), (0.1990552678, 0.0632748938)]):
        one = (student[index : index + 1], teacher[index : index + 1], LABELS[index : index + 1])
        assert target_kl(*one, temperature=1.0).item() == pytest.approx(target, abs=1e-9)
        assert nontarget_kl(*one, temperature=1.0).item() == pytest.approx(nontarget, abs=1e-9)
    total, _ = Objective(DKDParams(ce_weight=0))(Signals(student, LABELS, teacher))
    assert total.item() == pytest.approx(0.7404440449679146, abs=1e-12)
    close(gradient(total, student)[0], row(-0.1963498386, 0.3920813944, -0.3809376925, 0.1852061367))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_dkds_parts_make_up_the_kl_divergence(temperature: float) -> None:
    student, teacher, labels = random_logits(12, 6)
    parts = []
    for index in range(12):
        one = (student[index : index + 1], teacher[index : index + 1], labels[index : index + 1])
        others = 1 - (one[1] / temperature).softmax(1)[0, labels[index]]
        parts.append(target_kl(*one, temperature=temperature) + others * nontarget_kl(*one, temperature=temperature))
    together, plain = torch.stack(parts).mean(), kl_divergence(student, teacher, temperature=temperature)
    assert together.item() == pytest.approx(plain.item(), abs=1e-10)
    close(gradient(together, student), gradient(plain, student), 1e-10)


def test_standardised_distillation_has_the_fixtures_values(student: Tensor, teacher: Tensor) -> None:
    z_s, z_t = standardise(student), standardise(teacher)
    for index, expected in enumerate([0.1848441637, 0.0060475595]):
        loss = kl_divergence(z_s[index : index + 1], z_t[index : index + 1], temperature=1.0)
        assert loss.item() == pytest.approx(expected, abs=1e-9)
    assert kl_divergence(z_s, z_t, temperature=2.0).item() == pytest.approx(0.08436581126918638, abs=1e-12)


def test_standardised_logits_ignore_scale_and_offset_and_are_bounded() -> None:
    logits, _, _ = random_logits(5, 10)
    close(standardise(3 * logits + 5), standardise(logits), 1e-6)
    close(standardise(logits).std(dim=1), torch.ones(5), 1e-6)
    one_hot = 1e4 * torch.eye(10, dtype=torch.float64)
    assert standardise(one_hot).max().item() == pytest.approx(9 / math.sqrt(10))
    assert standardise(one_hot).softmax(1).max().item() == pytest.approx(0.724, abs=1e-3)
    constant = torch.full((2, 4), 3.0, dtype=torch.float64, requires_grad=True)
    assert not standardise(constant).any()
    assert gradient(standardise(constant)[:, 0].sum(), constant).isfinite().all()
    assert gradient(standardise(constant, floor=1e-3)[:, 0].sum(), constant).abs().max() <= 1e3


# --- levels -----------------------------------------------------------------------------------------------------


def test_levels_have_the_fixtures_targets(teacher: Tensor) -> None:
    partial = partial_teacher_targets(teacher, LABELS, temperature=1.0)
    close(partial[0], row(0.6572330228, 0.1142556591, 0.1142556591, 0.1142556591))
    close(partial[1], row(0.043525564, 0.043525564, 0.8694233079, 0.043525564))
    topk = topk_targets(teacher, num_kept=2, temperature=1.0)
    close(topk[0], row(0.6572330228, 0.2417825172, 0.05049223, 0.05049223), 1e-8)
    close(topk[1], row(0.071366611, 0.0296050405, 0.8694233079, 0.0296050405))
    close(topk_targets(teacher, num_kept=4, temperature=2.0), (teacher / 2).softmax(1), 1e-15)

    last_layer = torch.tensor([[1.0, 0, 0], [0.8, 0.6, 0], [0, 1, 0], [0, 0, 1]], dtype=torch.float64)
    similar = class_similarity_targets(last_layer @ last_layer.T, LABELS, power=1.0, temperature=1.0)
    close(similar[0], row(0.3914676287, 0.3205065864, 0.1440128925, 0.1440128925))
    similar = class_similarity_targets(last_layer @ last_layer.T, LABELS, power=1.0, temperature=0.3)
    close(similar[0], row(0.6310083408, 0.3239704844, 0.0225105874, 0.0225105874))
    opposite = class_similarity_targets(row(1, -0.5, -0.5, 1).reshape(2, 2), LABELS[:1], power=0.5, temperature=1.0)
    close(opposite[0], torch.softmax(row(1, 0), 0))


@pytest.mark.parametrize(
    ("ce_weight", "kd_weight", "temperature", "expected"),
    [(0.0, 1.0, 1.0, [0.5581716533, 0.6888928744]), (0.1, 0.9, 4.0, [0.5555726619, 0.9305997148])],
)
def test_distillation_rescales_the_labels_gradient_as_in_the_fixture(
    student: Tensor, teacher: Tensor, ce_weight: float, kd_weight: float, temperature: float, expected: list[float]
) -> None:
    ce = torch.nn.functional.cross_entropy(student, LABELS)
    total = gradient(ce_weight * ce + kd_weight * kl_divergence(student, teacher, temperature=temperature), student)
    alone = gradient(torch.nn.functional.cross_entropy(student, LABELS), student)
    on_label = total.gather(1, LABELS[:, None]) / alone.gather(1, LABELS[:, None])
    close(on_label[:, 0], row(*expected))
    off_label = torch.ones_like(total).scatter(1, LABELS[:, None], 0)
    close((total * off_label).sum(1), on_label[:, 0] * (alone * off_label).sum(1), 1e-12)


def test_levels_against_probabilities_that_have_zeros(student: Tensor) -> None:
    certain = smoothed_label_targets(LABELS, 4, label_smoothing=0.0)
    loss = soft_target_kl(student, certain, temperature=1.0)
    assert loss.item() == pytest.approx(1.0197099179441207, abs=1e-12)
    smooth = smoothed_label_targets(LABELS, 4, label_smoothing=0.1)
    close(smooth, 0.9 * certain + 0.025, 1e-7)
