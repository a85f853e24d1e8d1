"""Levels of a teacher's knowledge: targets that keep a part of its probabilities and give up the rest."""

from __future__ import annotations

from typing import Literal, assert_never

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from pipeline.errors import ModelError
from pipeline.losses.cross_entropy import label_term
from pipeline.losses.objective import LOSSES, Signals, TeacherNeed, Term
from pipeline.losses.softened import SoftenedLossParams
from pipeline.losses.standardise import standardise
from pipeline.losses.tensors import Labels, Logits, Scalar, widen

Targets = Float[Tensor, "batch classes"]
Level = Literal["label_smoothing", "partial_teacher", "class_similarity", "partial_and_similarity", "topk"]


def soft_target_kl(student_logits: Logits, targets: Targets, *, temperature: float) -> Scalar:
    """How far the student's softened probabilities are from given ones.

    ``temperature^2 * KL(targets || softmax(z_s / temperature))``, where a target of 0 counts nothing.

    Args:
        student_logits: (B, C) logits.
        targets: (B, C) probabilities, each row of sum 1.
        temperature: > 0.

    Returns:
        Scalar, nats times temperature^2, sum over classes and mean over the batch, at least 0.

    The targets are detached.
    """
    log_probabilities = torch.log_softmax(widen(student_logits) / temperature, dim=1)
    targets = targets.detach().to(log_probabilities.dtype)
    entropy = torch.special.entr(targets)
    return temperature**2 * (-entropy - targets * log_probabilities).sum(dim=1).mean()


def smoothed_label_targets(labels: Labels, num_classes: int, *, label_smoothing: float) -> Targets:
    """Regularisation and nothing of the teacher: ``(1 - label_smoothing) * onehot(y) + label_smoothing / C``.

    Args:
        labels: (B,) class numbers in 0..C-1.
        num_classes: C.
        label_smoothing: in [0, 1].

    Returns:
        (B, C) float32 probabilities.
    """
    targets = torch.full((len(labels), num_classes), label_smoothing / num_classes, device=labels.device)
    return targets.scatter_add_(1, labels[:, None], torch.full_like(targets[:, :1], 1 - label_smoothing))


def partial_teacher_targets(teacher_logits: Logits, labels: Labels, *, temperature: float) -> Targets:
    """The teacher's probability of the label, the rest spread evenly: how hard the sample is, not what it is like.

    Args:
        teacher_logits: (B, C) logits, C at least 2; a constant added to a row changes nothing.
        labels: (B,) class numbers in 0..C-1.
        temperature: > 0, softens the teacher's probabilities.

    Returns:
        (B, C) probabilities.

    Source: KD-pt of arXiv 2002.03532 as we know it; its formula is reconstructed.
    """
    log_probabilities = torch.log_softmax(widen(teacher_logits.detach()) / temperature, dim=1)
    on_label = log_probabilities.gather(1, labels[:, None])
    elsewhere = -torch.expm1(on_label) / (log_probabilities.shape[1] - 1)
    return elsewhere.expand_as(log_probabilities).scatter(1, labels[:, None], on_label.exp())


def class_similarity_targets(
    similarity: Float[Tensor, "classes classes"], labels: Labels, *, power: float, temperature: float
) -> Targets:
    """What a class is like, the same for all its samples: softmax of the similarities of the label's class.

    ``softmax_i(similarity(y, i)^power / temperature)``.

    Args:
        similarity: (C, C) cosines of the rows of the teacher's last layer, -1 to 1.
        labels: (B,) class numbers in 0..C-1.
        power: > 0; below 1 it lifts small similarities. Other than 1, negative ones count as 0.
        temperature: > 0, in units of cosines; low: close to the label.

    Returns:
        (B, C) probabilities.

    Source: KD-sim of arXiv 2002.03532 as we know it; its formula is reconstructed.
    """
    rows = widen(similarity.detach())[labels]
    if power != 1:
        rows = rows.clamp(min=0) ** power
    return torch.softmax(rows / temperature, dim=1)


def topk_targets(teacher_logits: Logits, *, num_kept: int, temperature: float) -> Targets:
    """The teacher's largest probabilities, the rest spread evenly over the other classes.

    Args:
        teacher_logits: (B, C) logits; a constant added to a row changes nothing.
        num_kept: at least 1; from C on all probabilities are kept. Of equal ones at the limit, any.
        temperature: > 0, softens the teacher's probabilities.

    Returns:
        (B, C) probabilities.

    Source: KD-topk of arXiv 2002.03532 as we know it (reconstructed); the same as marginal smoothing in arXiv
    2112.01528.
    """
    probabilities = torch.softmax(widen(teacher_logits.detach()) / temperature, dim=1)
    num_others = probabilities.shape[1] - num_kept
    if num_others <= 0:
        return probabilities
    kept, columns = probabilities.topk(num_kept, dim=1)
    # A sum that rounding takes above 1 would make the others negative.
    elsewhere = (1 - kept.sum(dim=1, keepdim=True)).clamp(min=0) / num_others
    return elsewhere.expand_as(probabilities).scatter(1, columns, kept)


@LOSSES.register
class LevelsParams(SoftenedLossParams):
    """One level of the teacher's knowledge alone, in the style of arXiv 2002.03532, not a reproduction of it.

    The paper tells three levels apart: of the universe (label smoothing), of the domain (which classes are
    alike) and of the instance (how hard a sample is). Its formulas and settings are not known to us in detail;
    these are reconstructed.
    """

    name: Literal["levels"] = "levels"
    level: Level = "partial_teacher"
    """What the targets keep: nothing of the teacher (label_smoothing), its confidence in the label, the similarity
    of the classes in its last layer, a mixture of these two, or its largest probabilities (topk)."""
    temperature: float = Field(default=4.0, gt=0, allow_inf_nan=False)
    """Softens the student's probabilities and those of the teacher that are kept."""
    label_smoothing: float = Field(default=0.1, ge=0, le=1)
    """Level ``label_smoothing``: share of the target spread evenly over all classes."""
    similarity_power: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Levels with similarity: exponent of the cosines; other than 1, negative ones count as 0."""
    similarity_temperature: float = Field(default=0.3, gt=0, allow_inf_nan=False)
    """Levels with similarity: temperature of the softmax over cosines."""
    similarity_share: float = Field(default=0.5, ge=0, le=1)
    """Level ``partial_and_similarity``: share of the similarity's targets, the rest are the partial teacher's."""
    num_kept: int = Field(default=5, ge=1)
    """Level ``topk``: how many of the teacher's probabilities are kept."""
    kd_weight: float = Field(default=0.9, ge=0, allow_inf_nan=False)
    """Weight of the distance to the targets."""
    ce_weight: float = Field(default=0.1, ge=0, allow_inf_nan=False)
    """Weight of the cross-entropy with the labels; 0: no labels are needed at level ``topk``."""

    @property
    def needs(self) -> frozenset[TeacherNeed]:
        by_level: dict[Level, frozenset[TeacherNeed]] = {
            "label_smoothing": frozenset(),
            "partial_teacher": frozenset({"full"}),
            "class_similarity": frozenset({"last_layer"}),
            "partial_and_similarity": frozenset({"full", "last_layer"}),
            "topk": frozenset({"full" if self.standardise or "temperature" in self.schedule else "topk"}),
        }
        return by_level[self.level]

    @property
    def topk_temperatures(self) -> frozenset[float]:
        return frozenset({self.temperature}) if self.level == "topk" else frozenset()

    def targets(self, signals: Signals) -> Targets:
        """The targets of a batch."""
        if self.level == "topk":
            _, teacher_logits = self.logits_of(signals, "levels")
            return topk_targets(teacher_logits, num_kept=self.num_kept, temperature=self.temperature)
        labels, num_classes = signals.labels_for("levels"), signals.student_logits.shape[1]
        if self.level == "label_smoothing":
            return smoothed_label_targets(labels, num_classes, label_smoothing=self.label_smoothing)
        if self.level == "partial_teacher":
            return self._partial_teacher(signals, labels)
        if self.level == "class_similarity":
            return self._class_similarity(signals, labels, num_classes)
        if self.level == "partial_and_similarity":
            similar = self._class_similarity(signals, labels, num_classes)
            return torch.lerp(self._partial_teacher(signals, labels), similar, self.similarity_share)
        assert_never(self.level)

    def _partial_teacher(self, signals: Signals, labels: Tensor) -> Tensor:
        _, teacher_logits = self.logits_of(signals, "levels")
        return partial_teacher_targets(teacher_logits, labels, temperature=self.temperature)

    def _class_similarity(self, signals: Signals, labels: Tensor, num_classes: int) -> Tensor:
        similarity = signals.class_similarity_for("levels")
        if similarity.shape != (num_classes, num_classes):
            raise ModelError(
                f"the teacher's class similarity has shape {tuple(similarity.shape)} but the student tells "
                f"{num_classes} classes apart: both must be trained for the same classes."
            )
        return class_similarity_targets(
            similarity.to(signals.student_logits.dtype),
            labels,
            power=self.similarity_power,
            temperature=self.similarity_temperature,
        )

    def terms(self) -> tuple[Term, ...]:
        def match(signals: Signals) -> Scalar:
            student = standardise(signals.student_logits) if self.standardise else signals.student_logits
            return soft_target_kl(student, self.targets(signals), temperature=self.temperature)

        def ce(signals: Signals) -> Scalar:
            return label_term(signals, "ce")

        return (
            Term("levels", self.kd_weight, match, labels="none" if self.level == "topk" else "one"),
            Term("ce", self.ce_weight, ce, labels="pair"),
        )
