"""Decoupled distillation: the label's class and the others apart."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import logsigmoid

from pipeline.losses.cross_entropy import label_term
from pipeline.losses.objective import LOSSES, Signals, Term
from pipeline.losses.softened import SoftenedLossParams
from pipeline.losses.tensors import Labels, Logits, Scalar, widen


def target_kl(student_logits: Logits, teacher_logits: Logits, labels: Labels, *, temperature: float) -> Scalar:
    """How far the student's probability of the label is from the teacher's.

    ``temperature^2 * KL((p_y, 1 - p_y) || (q_y, 1 - q_y))`` with ``p``, ``q`` the softmax of teacher's and student's
    logits over ``temperature``.

    Args:
        student_logits: (B, C) logits, C at least 2.
        teacher_logits: (B, C) logits; a constant added to a row changes nothing.
        labels: (B,) class numbers in 0..C-1.
        temperature: > 0.

    Returns:
        Scalar, nats times temperature^2, mean over the batch, at least 0.

    The teacher is detached. Source: arXiv 2203.08679 (TCKD). Its code takes the logarithm of rounded
    probabilities; here both logarithms come from the log-odds, which stay exact for confident logits.
    """
    student = _log_odds(widen(student_logits) / temperature, labels)
    teacher = _log_odds(widen(teacher_logits.detach()) / temperature, labels)
    on_label = teacher.sigmoid() * (logsigmoid(teacher) - logsigmoid(student))
    on_others = (-teacher).sigmoid() * (logsigmoid(-teacher) - logsigmoid(-student))
    return temperature**2 * (on_label + on_others).mean()


def nontarget_kl(student_logits: Logits, teacher_logits: Logits, labels: Labels, *, temperature: float) -> Scalar:
    """How far the student's probabilities of the classes that are not the label are from the teacher's.

    ``temperature^2 * KL(p' || q')`` with ``p'``, ``q'`` the softmax of teacher's and student's logits over
    ``temperature`` without the label's.

    Args:
        student_logits: (B, C) logits, C at least 2.
        teacher_logits: (B, C) logits; a constant added to a row changes nothing.
        labels: (B,) class numbers in 0..C-1.
        temperature: > 0.

    Returns:
        Scalar, nats times temperature^2, sum over classes and mean over the batch, at least 0.

    The teacher is detached. ``target_kl`` plus this, weighted by 1 less the teacher's probability of the label
    in each row, is ``kl_divergence``. Source: arXiv 2203.08679 (NCKD), whose code subtracts 1,000 from the
    label's logit; here it is left out, which has no range of logits where it fails.
    """
    columns = _other_columns(student_logits.shape[1], labels)
    student = torch.log_softmax(widen(student_logits).gather(1, columns) / temperature, dim=1)
    teacher = torch.log_softmax(widen(teacher_logits.detach()).gather(1, columns) / temperature, dim=1)
    return temperature**2 * (teacher.exp() * (teacher - student)).sum(dim=1).mean()


def _other_columns(num_classes: int, labels: Tensor) -> Tensor:
    """(B, C-1): the columns that are not the label's, in order."""
    columns = torch.arange(num_classes - 1, device=labels.device)
    return columns + (columns >= labels[:, None])


def _log_odds(logits: Tensor, labels: Tensor) -> Tensor:
    """(B,): the logarithm of p_y / (1 - p_y)."""
    others = logits.gather(1, _other_columns(logits.shape[1], labels))
    return logits.gather(1, labels[:, None]).squeeze(1) - others.logsumexp(dim=1)


@LOSSES.register
class DKDParams(SoftenedLossParams):
    """Decoupled distillation (arXiv 2203.08679) plus cross-entropy with the labels.

    The defaults are the published ones for CIFAR-100. Elsewhere: nontarget_weight 2 to 8 by the pair of
    networks; for ImageNet temperature 1 and nontarget_weight 0.5 to 2. The publication raises both weights of
    the teacher from 0 over the first 20 epochs (ImageNet: 1).
    """

    name: Literal["dkd"] = "dkd"
    temperature: float = Field(default=4.0, gt=0, allow_inf_nan=False)
    """Softens both sides' probabilities."""
    target_weight: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """Weight of the distance in the label's probability."""
    nontarget_weight: float = Field(default=8.0, ge=0, allow_inf_nan=False)
    """Weight of the distance in the other classes' probabilities among themselves."""
    ce_weight: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """Weight of the cross-entropy with the labels; at 0 labels are still needed."""

    def terms(self) -> tuple[Term, ...]:
        def target(signals: Signals) -> Scalar:
            student, teacher = self.logits_of(signals, "target")
            return target_kl(student, teacher, signals.labels_for("target"), temperature=self.temperature)

        def nontarget(signals: Signals) -> Scalar:
            student, teacher = self.logits_of(signals, "nontarget")
            return nontarget_kl(student, teacher, signals.labels_for("nontarget"), temperature=self.temperature)

        def ce(signals: Signals) -> Scalar:
            return label_term(signals, "ce")

        return (
            Term("target", self.target_weight, target, labels="one"),
            Term("nontarget", self.nontarget_weight, nontarget, labels="one"),
            Term("ce", self.ce_weight, ce, labels="pair"),
        )
