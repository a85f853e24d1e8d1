"""Regression of the teacher's logits."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipeline.losses.cross_entropy import label_term
from pipeline.losses.objective import LOSSES, Signals, TeacherLossParams, Term
from pipeline.losses.tensors import Logits, Scalar, widen


def logit_mse(student_logits: Logits, teacher_logits: Logits) -> Scalar:
    """Squared distance of the logits, their common offset included.

    ``mean_k (z_s - z_t)_k^2``.

    Args:
        student_logits: (B, C) logits.
        teacher_logits: (B, C) logits, not log-probabilities: a row's offset counts.

    Returns:
        Scalar, squared logits, mean over classes and over the batch, at least 0.

    The teacher is detached. Source: Kim et al., arXiv 2105.08919, whose code takes this mean over
    batch and classes.
    """
    difference = widen(student_logits) - widen(teacher_logits.detach())
    return difference.square().mean()


def centred_logit_mse(student_logits: Logits, teacher_logits: Logits) -> Scalar:
    """Squared distance of the logits up to a constant per row: distillation at infinite temperature.

    ``1/2 mean_k (d_k - mean_j d_j)^2`` with ``d = z_s - z_t``.

    Args:
        student_logits: (B, C) logits.
        teacher_logits: (B, C) logits or log-probabilities: a row's offset does not count.

    Returns:
        Scalar, squared logits, mean over classes and over the batch, at least 0.

    The teacher is detached. It is the exact limit of ``kl_divergence`` for large temperatures
    (arXiv 2105.08919, eq. 3), hence the factor 1/2 that ``logit_mse`` does not have.
    """
    difference = widen(student_logits) - widen(teacher_logits.detach())
    return (difference - difference.mean(dim=1, keepdim=True)).square().mean() / 2


@LOSSES.register
class LogitMSEParams(TeacherLossParams):
    """Mean squared error of the logits (arXiv 2105.08919), by default without labels as in the paper."""

    name: Literal["logit_mse"] = "logit_mse"
    centred: bool = False
    """Ignore each row's offset, which softmax does not see: for teachers that give probabilities only."""
    kd_weight: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """Weight of the distance to the teacher."""
    ce_weight: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Weight of the cross-entropy with the labels; 0: no labels are needed."""

    def terms(self) -> tuple[Term, ...]:
        def mse(signals: Signals) -> Scalar:
            distance = centred_logit_mse if self.centred else logit_mse
            return distance(signals.student_logits, signals.teacher_logits_for("mse"))

        def ce(signals: Signals) -> Scalar:
            return label_term(signals, "ce")

        return Term("mse", self.kd_weight, mse), Term("ce", self.ce_weight, ce, labels="pair")
