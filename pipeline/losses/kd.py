"""Knowledge distillation: match the teacher's softened probabilities."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from pipeline.losses.cross_entropy import label_term
from pipeline.losses.objective import LOSSES, Signals, TeacherNeed, Term
from pipeline.losses.softened import SoftenedLossParams
from pipeline.losses.tensors import Logits, Scalar, widen


def kl_divergence(student_logits: Logits, teacher_logits: Logits, *, temperature: float) -> Scalar:
    """How far the student's softened probabilities are from the teacher's.

    ``temperature^2 * KL(softmax(z_t / temperature) || softmax(z_s / temperature))``. The factor keeps the
    size of the gradient comparable as the temperature changes.

    Args:
        student_logits: (B, C) logits.
        teacher_logits: (B, C) logits; a constant added to a row changes nothing.
        temperature: > 0; towards infinity the loss becomes the centred logit MSE, below 1 its gradient
            vanishes in proportion to the temperature.

    Returns:
        Scalar, nats times temperature^2, sum over classes and mean over the batch, at least 0.

    The teacher is detached. Source: Hinton et al., arXiv 1503.02531.
    """
    student = torch.log_softmax(widen(student_logits) / temperature, dim=1)
    teacher = torch.log_softmax(widen(teacher_logits.detach()) / temperature, dim=1)
    return temperature**2 * (teacher.exp() * (teacher - student)).sum(dim=1).mean()


@LOSSES.register
class KDParams(SoftenedLossParams):
    """Vanilla distillation (arXiv 1503.02531) plus cross-entropy with the labels.

    The defaults are the setting in common use for CIFAR (RepDistiller, mdistiller):
    ``0.9 * KD + 0.1 * CE`` at temperature 4.
    """

    name: Literal["kd"] = "kd"
    temperature: float = Field(default=4.0, gt=0, allow_inf_nan=False)
    """Softens both sides' probabilities."""
    kd_weight: float = Field(default=0.9, ge=0, allow_inf_nan=False)
    """Weight of the distance to the teacher."""
    ce_weight: float = Field(default=0.1, ge=0, allow_inf_nan=False)
    """Weight of the cross-entropy with the labels; 0: no labels are needed."""

    @property
    def needs(self) -> frozenset[TeacherNeed]:
        # Its sum over the classes is ruled by the largest probabilities, as long as these are the teacher's own.
        return frozenset({"full" if self.standardise or "temperature" in self.schedule else "topk"})

    @property
    def topk_temperatures(self) -> frozenset[float]:
        return frozenset({self.temperature})

    def terms(self) -> tuple[Term, ...]:
        def kd(signals: Signals) -> Scalar:
            student, teacher = self.logits_of(signals, "kd")
            return kl_divergence(student, teacher, temperature=self.temperature)

        def ce(signals: Signals) -> Scalar:
            return label_term(signals, "ce")

        return Term("kd", self.kd_weight, kd), Term("ce", self.ce_weight, ce, labels="pair")
