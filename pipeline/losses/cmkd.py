"""Correlation matching in the style of CMKD: Pearson's and Spearman's, weighted by each row's difficulty."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, assert_never

import torch
from jaxtyping import Float, Int64
from pydantic import Field
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipeline.losses.batch import OncePerBatch
from pipeline.losses.chunks import row_chunks
from pipeline.losses.correlation import SMOOTH_FLOOR, pearson, softmax_correlations
from pipeline.losses.cross_entropy import label_term
from pipeline.losses.objective import LOSSES, LabelUse, Signals, Term
from pipeline.losses.soft_rank import average_ranks, degenerate_shares, soft_rank
from pipeline.losses.softened import SoftenedLossParams
from pipeline.losses.tensors import Labels, Logits, Scalar, Weights, widen

Difficulty = Literal["entropy", "label", "margin", "constant"]


def soft_spearman(
    student_logits: Logits, teacher_logits: Logits, *, strength: float | None = None
) -> tuple[Float[Tensor, " batch"], Int64[Tensor, " batch"]]:
    """How far the classes of each row are in the same order.

    Pearson's correlation of the student's soft ranks with the teacher's hard ones, ties averaged.

    Args:
        student_logits: (B, C) logits, as a rule standardised.
        teacher_logits: (B, C) logits, of which only the order counts.
        strength: > 0, of the soft rank, in the units of ``student_logits``; none: 1/C.

    Returns:
        (B,) in [-1, 1], and the number of blocks of each row (``degenerate_shares``).

    The teacher is detached, which is why hard ranks do for it. Source of the soft rank: arXiv 2002.08871.
    """
    strength = strength or 1 / student_logits.shape[1]
    if student_logits.device.type == "cpu":
        return _SoftSpearman.apply(widen(student_logits), widen(teacher_logits.detach()), strength)
    ranks, num_blocks = soft_rank(student_logits, strength=strength)
    return pearson(ranks, average_ranks(teacher_logits.detach()).to(ranks.dtype)), num_blocks


class _SoftSpearman(torch.autograd.Function):
    """Computes the gradient with the value, while the ranks of a few rows are in a core's caches."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, strength: float) -> tuple[Tensor, Tensor]:
        from pipeline.losses.kernels import cpu

        arrays = student.detach().contiguous().numpy(), teacher.contiguous().numpy()
        found = cpu.correlate_ranks(*arrays, strength, SMOOTH_FLOOR, torch.get_num_threads())
        rho, num_blocks, slopes = (torch.from_numpy(array) for array in found)
        ctx.save_for_backward(slopes)
        ctx.mark_non_differentiable(num_blocks)
        return rho, num_blocks

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        (slopes,) = ctx.saved_tensors
        return slopes * grad[:, None], None, None


@torch.no_grad()
def teacher_difficulty(teacher_logits: Logits, kind: Difficulty, labels: Labels | None = None) -> Weights:
    """How hard a row is for the teacher, from its probabilities at temperature 1.

    Args:
        teacher_logits: (B, C) logits; a constant added to a row changes nothing.
        kind: ``entropy``, over log C; ``label``, 1 less the label's probability; ``margin``, 1 less the distance of
            the two largest probabilities; ``constant``, 0.5.
        labels: (B,) class numbers, needed for ``label``.

    Returns:
        (B,) in [0, 1], 1 the hardest. No gradient.
    """
    teacher_logits = widen(teacher_logits)
    parts = [
        _of_rows(torch.log_softmax(teacher_logits[rows], dim=1), kind, None if labels is None else labels[rows])
        for rows in row_chunks(teacher_logits)
    ]
    return torch.cat(parts)


def _of_rows(log_probabilities: Tensor, kind: Difficulty, labels: Tensor | None) -> Tensor:
    if kind == "entropy":
        entropy = -log_probabilities.exp().mul_(log_probabilities).sum(dim=1)
        return (entropy / math.log(log_probabilities.shape[1])).clamp(0, 1)
    if kind == "label":
        if labels is None:
            raise ValueError("labels are needed for the difficulty of kind 'label'")
        return -torch.expm1(log_probabilities.gather(1, labels[:, None]).squeeze(1))
    if kind == "margin":
        top = log_probabilities.topk(2, dim=1).values.exp()
        return 1 - (top[:, 0] - top[:, 1])
    if kind == "constant":
        return log_probabilities.new_full((len(log_probabilities),), 0.5)
    assert_never(kind)


class Distances(NamedTuple):
    """What the terms that correlate come to for a batch."""

    values: dict[str, Tensor]
    """By the name of the term; those of weight 0 left out."""
    num_blocks: Tensor | None
    """(B,) blocks of the soft ranks; none where ranks have no weight."""


@LOSSES.register
class CMKDParams(SoftenedLossParams):
    """Distillation in the style of CMKD (arXiv 2410.06561), not a reproduction of it.

    The paper matches Pearson's and Spearman's correlations, weighted by each sample's difficulty, by means of
    differentiable sorting. What it measures difficulty by, how it weights, and its soft rank are not known to
    us: every such choice is an option here, and results are to be reported as "in the style of".
    By default ``CE + 2 * mean_i ((1 - h_i) (1 - pearson_i) + h_i (1 - spearman_i))`` with the teacher's normalised
    entropy ``h``, and the weights and temperature of DIST.
    """

    name: Literal["cmkd"] = "cmkd"
    temperature: float = Field(default=4.0, gt=0, allow_inf_nan=False)
    """Softens the probabilities whose Pearson correlation is taken (space ``prob``), after standardising."""
    standardise: bool = True
    """Standardise both sides' logits in each row first (arXiv 2403.01427)."""
    space: Literal["prob", "logit"] = "prob"
    """What Pearson's correlation is taken of."""
    difficulty: Difficulty = "entropy"
    """Of the teacher: its entropy, 1 less the label's probability, 1 less its margin, or 0.5 for every row."""
    harder_gets: Literal["spearman", "pearson"] = "spearman"
    """Which correlation the harder rows weigh more."""
    soft_rank_strength: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Gap of logits above which ranks are hard; none: 1/C, which suits standardised logits."""
    pearson_weight: float = Field(default=2.0, ge=0, allow_inf_nan=False)
    """Weight of Pearson's correlation within a row."""
    spearman_weight: float = Field(default=2.0, ge=0, allow_inf_nan=False)
    """Weight of Spearman's correlation within a row, by soft ranks."""
    intra_weight: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Weight of the rows' correlation within a class, as in DIST; above 0 the batch is part of the method."""
    ce_weight: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """Weight of the cross-entropy with the labels; 0: no labels are needed."""

    @property
    def couples_batch(self) -> bool:
        return self.intra_weight > 0

    def distances(self, signals: Signals) -> Distances:
        """The terms of a batch that correlate, those without weight left out."""
        weights = {"pearson": self.pearson_weight, "spearman": self.spearman_weight, "intra": self.intra_weight}
        wanted = [name for name, weight in weights.items() if weight > 0]
        student, teacher = self.logits_of(signals, wanted[0])
        rows, intra = self._correlate(student, teacher, "pearson" in wanted, "intra" in wanted)

        values, num_blocks = {}, None
        if intra is not None:
            values["intra"] = 1 - intra.mean()
        if rows is not None or "spearman" in wanted:
            labels = signals.labels_for(wanted[0]) if self.difficulty == "label" else None
            difficulty = teacher_difficulty(signals.teacher_logits_for(wanted[0]), self.difficulty, labels)
            share = difficulty if self.harder_gets == "spearman" else 1 - difficulty
            if rows is not None:
                values["pearson"] = ((1 - share) * (1 - rows)).mean()
            if "spearman" in wanted:
                spearman, num_blocks = soft_spearman(student, teacher, strength=self.soft_rank_strength)
                values["spearman"] = (share * (1 - spearman)).mean()
        return Distances(values, num_blocks)

    def _correlate(
        self, student: Tensor, teacher: Tensor, rows: bool, columns: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        if self.space == "prob":
            return softmax_correlations(student, teacher, temperature=self.temperature, rows=rows, columns=columns)
        of_rows = pearson(student, teacher) if rows else None
        return of_rows, pearson(student.T, teacher.T) if columns else None

    def terms(self) -> tuple[Term, ...]:
        distances = OncePerBatch(self.distances)

        def match_pearson(signals: Signals) -> Scalar:
            return distances(signals).values["pearson"]

        def match_spearman(signals: Signals) -> Scalar:
            return distances(signals).values["spearman"]

        def count_blocks(signals: Signals) -> dict[str, Tensor]:
            num_blocks = distances(signals).num_blocks
            assert num_blocks is not None  # ranks have weight, or this term would not be computed
            shares = degenerate_shares(num_blocks, signals.student_logits.shape[1])
            return {"hard_rows": shares.hard, "linear_rows": shares.linear}

        def match_intra(signals: Signals) -> Scalar:
            return distances(signals).values["intra"]

        def ce(signals: Signals) -> Scalar:
            return label_term(signals, "ce")

        labels: LabelUse = "one" if self.difficulty == "label" else "none"
        return (
            Term("pearson", self.pearson_weight, match_pearson, labels=labels),
            Term("spearman", self.spearman_weight, match_spearman, labels=labels, diagnostics=count_blocks),
            Term("intra", self.intra_weight, match_intra),
            Term("ce", self.ce_weight, ce, labels="pair"),
        )
