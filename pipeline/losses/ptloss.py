"""PTLoss: KL divergence whose leading coefficients are perturbed, which teaches from a better teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import Field, ValidationInfo, field_validator, model_validator
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipeline.errors import ConfigError
from pipeline.losses.chunks import row_chunks
from pipeline.losses.cross_entropy import label_term
from pipeline.losses.objective import LOSSES, Signals, Term
from pipeline.losses.perturbation import Coefficients, Perturbation, check_coefficients
from pipeline.losses.softened import SoftenedLossParams
from pipeline.losses.tensors import Logits, Scalar, widen

AUTO = "auto"


def perturbed_kl(
    student_logits: Logits,
    teacher_logits: Logits,
    *,
    perturbation: Coefficients,
    temperature: float = 1.0,
) -> Scalar:
    """How far the student's probabilities are from the teacher's, by a perturbed measure.

    ``temperature^2 * sum_c p_c (log p_c - log q_c + sum_m eps_cm (1 - q_c)^m)`` with ``p``, ``q`` the softmax of
    teacher's and student's logits over ``temperature``. Its minimum is not at the teacher but at the proxy
    teacher that the coefficients imply.

    Args:
        student_logits: (B, C) logits.
        teacher_logits: (B, C) logits; a constant added to a row changes nothing.
        perturbation: coefficients eps_1 .. eps_M, (M,) for all, (C, M) by class or (B, C or 1, M) by row; of
            either type, at least -1/m each (not checked here). All zero: ``kl_divergence``.
        temperature: > 0.

    Returns:
        Scalar, nats times temperature^2, sum over classes and mean over the batch. It may be negative where a
        coefficient is.

    Teacher and coefficients are detached; differentiable once. Source: arXiv 2305.05010, eqs. 5 to 7, in the
    form that keeps the logarithm exact. The paper has temperature 1; the factor is that of ``kl_divergence``.

    Raises:
        ValueError: coefficients of another shape.
    """
    student, teacher = widen(student_logits), widen(teacher_logits.detach())
    batch, classes = student.shape
    shape = tuple(perturbation.shape)
    wanted = [(), (classes,), (batch, classes), (batch, 1)]
    if shape[:-1] not in wanted or not shape or not shape[-1]:
        raise ValueError(
            f"perturbation of shape {shape}, expected (M,), ({classes}, M), ({batch}, {classes}, M) or ({batch}, 1, M)"
        )
    # One contiguous row of numbers for each power, so that every pass below runs over whole vectors.
    powers = perturbation.detach().to(student.device, student.dtype).movedim(-1, 0).contiguous()
    return _PerturbedKL.apply(student, teacher, powers, temperature)


class _PerturbedKL(torch.autograd.Function):
    """Value and closed-form gradient in few passes over memory, which is what bounds the speed.

    With ``A_c = p_c sum_m m eps_cm (1 - q_c)^(m-1)`` the gradient of a row is
    ``q_k - p_k - q_k A_k + q_k sum_c q_c A_c``, times the temperature and over B.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, powers: Tensor, temperature: float) -> Tensor:
        gradient = torch.empty_like(student) if ctx.needs_input_grad[0] else None
        total = student.new_zeros(())
        for rows in row_chunks(student):
            total += _sum_of_rows(
                student[rows],
                teacher[rows],
                powers[:, rows] if powers.ndim == 3 else powers,
                temperature,
                None if gradient is None else gradient[rows],
            )
        ctx.save_for_backward(gradient)
        ctx.scale = temperature / len(student)
        return total * (temperature**2 / len(student))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * (grad_loss * ctx.scale), None, None, None


def _sum_of_rows(
    student: Tensor, teacher: Tensor, powers: Tensor, temperature: float, gradient: Tensor | None
) -> Tensor:
    """Sum of the rows' values at temperature-free scale; writes their gradients where there is a place for them."""
    softened = student / temperature
    log_q = torch.log_softmax(softened, dim=1)
    log_p = torch.log_softmax(torch.div(teacher, temperature, out=softened), dim=1)
    p = torch.exp(log_p, out=softened)
    difference = log_p.sub_(log_q)
    q = log_q.exp_()
    # -expm1(log q) would be no better: the log_softmax of a likely class is itself only known to one rounding of 1.
    u = 1 - q

    values = _horner(powers, u, torch.empty_like(u))
    total = difference.addcmul_(values, u).mul_(p).sum()
    if gradient is None:
        return total

    orders = torch.arange(1, len(powers) + 1, device=powers.device).reshape(-1, *[1] * (powers.ndim - 1))
    slopes = _horner(powers * orders, u, values).mul_(p)
    expected = torch.mul(q, slopes, out=u).sum(dim=1, keepdim=True)
    torch.sub(expected.add_(1), slopes, out=gradient).mul_(q).sub_(p)
    return total


def _horner(powers: Tensor, u: Tensor, out: Tensor) -> Tensor:
    """``sum_m powers[m] u^m``, m from 0, into ``out``: no power of a zero, and no (B, C, M) buffer."""
    *rest, last = powers.unbind(0)
    if not rest:
        return out.copy_(last)
    torch.mul(u, last, out=out).add_(rest.pop())
    while rest:
        torch.addcmul(rest.pop(), out, u, out=out)
    return out


@LOSSES.register
class PTLossParams(SoftenedLossParams):
    """PTLoss (arXiv 2305.05010), by default at temperature 1 and without labels as in the paper.

    The default coefficients double the weight of the first power, which sharpens the teacher a little; they
    are a place to start, not the paper's, which chooses them by data. ``select-perturbation`` does that from
    validation logits; ``perturbation_from`` names its run, or has it done when a run begins.
    """

    name: Literal["ptloss"] = "ptloss"
    perturbation: tuple[float, ...] = (1.0, 0.0, 0.0, 0.0, 0.0)
    """Coefficients eps_1, eps_2, ... shared by all classes, eps_m at least -1/m; all zero: plain distillation."""
    perturbation_from: str | None = None
    """Instead of ``perturbation``: a run of select-perturbation, or the file with coefficients that it wrote; or
    ``auto``: they are selected when a run begins, as ``selection`` says."""
    selected: Perturbation | None = None
    """What ``perturbation_from`` came to, read with the configuration, so that workers need not see the file."""
    temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Softens both sides' probabilities."""
    kd_weight: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """Weight of the distance to the teacher."""
    ce_weight: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Weight of the cross-entropy with the labels; 0: no labels are needed."""

    @field_validator("selected")
    @classmethod
    def _read_file(cls, value: Perturbation | None, info: ValidationInfo) -> Perturbation | None:
        place = info.data.get("perturbation_from")
        return Perturbation.read(Path(place)) if value is None and place not in (None, AUTO) else value

    @field_validator("perturbation")
    @classmethod
    def _check_coefficients(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not value:
            raise ValueError("expected at least one coefficient; (0,) is plain distillation")
        check_coefficients(value)
        return value

    @model_validator(mode="after")
    def _check_one_source(self) -> Self:
        if self.selected and not self.perturbation_from:
            raise ValueError("selected is filled in from perturbation_from: set that")
        if self.perturbation_from and self.perturbation != type(self).model_fields["perturbation"].default:
            raise ValueError("perturbation and perturbation_from are both set: leave one out")
        if self.perturbation_from == AUTO and (
            self.temperature != 1 or "temperature" in self.schedule or self.standardise
        ):
            raise ValueError(
                f"perturbation_from={AUTO} ranks coefficients for probabilities at temperature 1 as the teacher gives "
                "them: leave temperature at 1 and standardise off (selection.fit_temperature=true softens the teacher)"
            )
        return self

    @property
    def wants_perturbation(self) -> bool:
        return self.perturbation_from == AUTO and self.selected is None

    def with_perturbation(self, perturbation: Perturbation) -> Self:
        return self.model_copy(update={"selected": perturbation}) if self.wants_perturbation else self

    def terms(self) -> tuple[Term, ...]:
        perturbation = self.selected or Perturbation.shared(self.perturbation)

        def ptloss(signals: Signals) -> Scalar:
            if self.wants_perturbation:
                raise ConfigError(
                    f"perturbation_from={AUTO}: no coefficients were selected; the command distill does that when a "
                    "run begins, elsewhere give perturbation_from a run of select-perturbation."
                )
            student, teacher = self.logits_of(signals, "ptloss")
            coefficients = perturbation.for_rows(signals.teacher_logits_for("ptloss"))
            teacher = teacher / perturbation.teacher_temperature
            return perturbed_kl(student, teacher, perturbation=coefficients, temperature=self.temperature)

        def ce(signals: Signals) -> Scalar:
            return label_term(signals, "ce")

        return Term("ptloss", self.kd_weight, ptloss), Term("ce", self.ce_weight, ce, labels="pair")
