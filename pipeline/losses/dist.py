"""DIST: match the correlations of the teacher's probabilities, within rows and within classes."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from pipeline.losses.batch import OncePerBatch
from pipeline.losses.correlation import PUBLISHED_FLOOR, SMOOTH_FLOOR, softmax_correlations
from pipeline.losses.cross_entropy import label_term
from pipeline.losses.objective import LOSSES, Signals, Term
from pipeline.losses.softened import SoftenedLossParams
from pipeline.losses.tensors import Logits, Scalar


def dist_inter(
    student_logits: Logits,
    teacher_logits: Logits,
    *,
    temperature: float,
    floor: float = SMOOTH_FLOOR,
    additive: bool = False,
) -> Scalar:
    """How far each row's probabilities are from a linear function of the teacher's.

    ``temperature^2 * (1 - mean_i rho(p_i, q_i))`` with ``p_i``, ``q_i`` rows of softened probabilities and ``rho``
    Pearson's correlation: the relation of the classes within a sample.

    Args:
        student_logits: (B, C) logits.
        teacher_logits: (B, C) logits; a constant added to a row changes nothing.
        temperature: > 0.
        floor: > 0, probability; keeps the gradient of a constant row finite (``pearson``).
        additive: the published form of the floor, whose size is 1e-8 (``pearson``).

    Returns:
        Scalar, temperature^2 times 0 to 2, mean over the batch.

    The teacher is detached; differentiable once. Source: arXiv 2205.10536 and its code, whose floor is additive.
    """
    rho, _ = softmax_correlations(
        student_logits, teacher_logits, temperature=temperature, floor=floor, additive=additive, columns=False
    )
    return _distance(rho, temperature)


def dist_intra(
    student_logits: Logits,
    teacher_logits: Logits,
    *,
    temperature: float,
    floor: float = SMOOTH_FLOOR,
    additive: bool = False,
) -> Scalar:
    """How far each class's probabilities over the batch are from a linear function of the teacher's.

    ``temperature^2 * (1 - mean_c rho(p_c, q_c))`` with ``p_c``, ``q_c`` columns of softened probabilities and ``rho``
    Pearson's correlation: the relation of the samples within a class. The batch is part of the method; one of
    two rows has no gradient.

    Args:
        student_logits: (B, C) logits, B of 8 or more to be of use.
        teacher_logits: (B, C) logits; a constant added to a row changes nothing.
        temperature: > 0.
        floor: > 0, probability; keeps the gradient of a constant column finite (``pearson``).
        additive: the published form of the floor, whose size is 1e-8 (``pearson``).

    Returns:
        Scalar, temperature^2 times 0 to 2, mean over the classes.

    The teacher is detached; differentiable once. Source: arXiv 2205.10536 and its code, whose floor is additive.
    """
    _, rho = softmax_correlations(
        student_logits, teacher_logits, temperature=temperature, floor=floor, additive=additive, rows=False
    )
    return _distance(rho, temperature)


def _distance(rho: Tensor | None, temperature: float) -> Scalar:
    assert rho is not None
    return temperature**2 * (1 - rho.mean())


@LOSSES.register
class DISTParams(SoftenedLossParams):
    """DIST (arXiv 2205.10536): ``CE + 2 * inter + 2 * intra``, the published weights."""

    name: Literal["dist"] = "dist"
    temperature: float = Field(default=4.0, gt=0, allow_inf_nan=False)
    """Softens both sides' probabilities. Published: 4 for CIFAR, 1 for ImageNet."""
    inter_weight: float = Field(default=2.0, ge=0, allow_inf_nan=False)
    """Weight of the classes' correlation within a row."""
    intra_weight: float = Field(default=2.0, ge=0, allow_inf_nan=False)
    """Weight of the rows' correlation within a class; above 0 the batch is part of the method."""
    ce_weight: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """Weight of the cross-entropy with the labels; 0: no labels are needed."""
    published_floor: bool = False
    """Divide as the published code does, which gives its numbers, but unbounded gradients of constant rows. The default
    damps classes that are rare in the batch: at temperature 1 and with many classes, by much."""

    @property
    def couples_batch(self) -> bool:
        return self.intra_weight > 0

    def terms(self) -> tuple[Term, ...]:
        def correlate(signals: Signals) -> tuple[Tensor | None, Tensor | None]:
            student, teacher = self.logits_of(signals, "inter" if self.inter_weight else "intra")
            return softmax_correlations(
                student,
                teacher,
                temperature=self.temperature,
                floor=PUBLISHED_FLOOR if self.published_floor else SMOOTH_FLOOR,
                additive=self.published_floor,
                rows=self.inter_weight > 0,
                columns=self.intra_weight > 0,
            )

        correlations = OncePerBatch(correlate)

        def inter(signals: Signals) -> Scalar:
            return _distance(correlations(signals)[0], self.temperature)

        def intra(signals: Signals) -> Scalar:
            return _distance(correlations(signals)[1], self.temperature)

        def ce(signals: Signals) -> Scalar:
            return label_term(signals, "ce")

        return (
            Term("inter", self.inter_weight, inter),
            Term("intra", self.intra_weight, intra),
            Term("ce", self.ce_weight, ce, labels="pair"),
        )
