"""Objectives: named, weighted terms over what a batch offers a loss."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, NamedTuple, Self

import torch
from jaxtyping import Float, Int64
from pydantic import model_validator
from torch import Tensor

from pipeline.errors import ConfigError, ModelError
from pipeline.registry import Params, Registry

Logits = Float[Tensor, "batch classes"]
Labels = Int64[Tensor, " batch"]
Weights = Float[Tensor, " batch"]
Scalar = Float[Tensor, ""]

TeacherNeed = Literal["full", "topk", "last_layer", "class_counts"]


def widen(logits: Tensor) -> Tensor:
    """``logits`` in float32, or unchanged where they are wider: losses lose too much in bf16."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


class LabelPairs(NamedTuple):
    """The labels of a batch whose images may be mixed in pairs; see ``Signals`` for the fields."""

    labels: Tensor
    partner_labels: Tensor | None
    label_weights: Tensor | None


@dataclass(frozen=True)
class Signals:
    """What a batch offers a loss.

    Attributes:
        student_logits: (B, C), with gradient.
        labels: (B,) int64 class numbers, or none.
        teacher_logits: (B, C), free of temperature, or none.
        partner_labels: (B,) int64, where images are mixed in pairs: the label of the other image.
        label_weights: (B,) float32 in [0, 1], with them: the weight of ``labels``; the partner's is the rest.
    """

    student_logits: Tensor
    labels: Tensor | None = None
    teacher_logits: Tensor | None = None
    partner_labels: Tensor | None = None
    label_weights: Tensor | None = None

    def labels_for(self, term: str) -> Tensor:
        """The labels, for a term that takes one a row; ConfigError naming ``term`` where there are none, or two."""
        pairs = self.label_pairs_for(term)
        if pairs.partner_labels is not None:
            raise ConfigError(
                f"loss term {term!r} takes one label a row, but data.augment mixes images and their labels: "
                "set data.augment.mixup=0 and data.augment.cutmix=0, or its weight to 0."
            )
        return pairs.labels

    def label_pairs_for(self, term: str) -> LabelPairs:
        """The labels, for a term that takes two a row as well; ConfigError naming ``term`` where there are none."""
        if self.labels is None:
            raise ConfigError(
                f"loss term {term!r} needs labels but the batch has none: use labelled data, or set its weight to 0."
            )
        return LabelPairs(self.labels, self.partner_labels, self.label_weights)

    def teacher_logits_for(self, term: str) -> Tensor:
        """The teacher's logits; ConfigError naming ``term`` where the batch has none."""
        if self.teacher_logits is None:
            raise ConfigError(
                f"loss term {term!r} needs the teacher's logits but the batch has none: configure a teacher, "
                "or use a loss without one (loss=cross_entropy)."
            )
        return self.teacher_logits


@dataclass(frozen=True)
class Term:
    """One summand of an objective.

    Attributes:
        name: under which its value is logged.
        weight: factor in the total, at least 0.
        function: mean over the batch, a scalar.
        uses_labels: whether ``function`` reads the labels.
    """

    name: str
    weight: float
    function: Callable[[Signals], Tensor]
    uses_labels: bool = False


class LossParams(Params):
    """Parameters of a loss: what it needs, and the terms it consists of."""

    name: str

    needs: ClassVar[frozenset[TeacherNeed]] = frozenset()
    """What of the teacher the loss reads; a cache that does not hold it is refused."""
    couples_batch: ClassVar[bool] = False
    """Whether a row's gradient depends on the other rows, so that the batch size is part of the method."""

    @abstractmethod
    def terms(self) -> tuple[Term, ...]:
        """The terms, those of weight 0 included."""

    @property
    def needs_teacher(self) -> bool:
        return bool(self.needs)

    @property
    def needs_labels(self) -> bool:
        return any(term.uses_labels and term.weight > 0 for term in self.terms())

    @model_validator(mode="after")
    def _check_some_weight(self) -> Self:
        terms = self.terms()
        if not any(term.weight > 0 for term in terms):
            raise ValueError(
                f"every term ({', '.join(term.name for term in terms)}) has weight 0, so nothing is learnt; raise one"
            )
        return self


LOSSES: Registry[LossParams] = Registry("loss", "pipeline.losses")


class Objective:
    """Weighted sum of terms; those of weight 0 are not computed.

    Args:
        terms: with distinct names.
    """

    def __init__(self, terms: Iterable[Term]) -> None:
        self.terms = tuple(term for term in terms if term.weight > 0)

    @classmethod
    def from_params(cls, params: LossParams) -> Objective:
        return cls(params.terms())

    @property
    def label_terms(self) -> tuple[str, ...]:
        """Names of the terms that read the labels."""
        return tuple(term.name for term in self.terms if term.uses_labels)

    def __call__(self, signals: Signals) -> tuple[Tensor, dict[str, Tensor]]:
        """Computes the total and what it is made of, in float32 whatever autocast says (float64 stays float64).

        Returns:
            The scalar ``sum(weight * term)``, and the detached unweighted value of each term by name.
            No gradient reaches the teacher's logits.

        Raises:
            ConfigError: a term needs labels or teacher logits that the batch does not have.
            ModelError: student and teacher logits differ in shape.
        """
        signals = _prepare(signals)
        with torch.autocast(signals.student_logits.device.type, enabled=False):
            values = {term.name: term.function(signals) for term in self.terms}
            total = signals.student_logits.new_zeros(())
            for term in self.terms:
                total = total + term.weight * values[term.name]
        return total, {name: value.detach() for name, value in values.items()}


def _prepare(signals: Signals) -> Signals:
    """Widened logits, the teacher's without gradient; refuses logits of different shapes."""
    student, teacher = signals.student_logits, signals.teacher_logits
    if teacher is not None:
        if student.shape != teacher.shape:
            raise ModelError(
                f"student logits have shape {tuple(student.shape)} and teacher logits {tuple(teacher.shape)} "
                "(batch, classes): both must be trained for the same classes."
            )
        teacher = widen(teacher.detach())
    return replace(signals, student_logits=widen(student), teacher_logits=teacher)
