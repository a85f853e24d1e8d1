"""Objectives: named, weighted terms over what a batch offers a loss, over the course of training."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from pipeline.errors import ConfigError, ModelError
from pipeline.losses.perturbation import Perturbation
from pipeline.losses.schedule import Schedule, check_schedules
from pipeline.losses.tensors import widen
from pipeline.registry import Params, Registry

TeacherNeed = Literal["full", "topk", "last_layer", "class_counts"]
LabelUse = Literal["none", "one", "pair"]


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
        class_similarity: (C, C) cosines of the rows of the teacher's last layer, or none.
    """

    student_logits: Tensor
    labels: Tensor | None = None
    teacher_logits: Tensor | None = None
    partner_labels: Tensor | None = None
    label_weights: Tensor | None = None
    class_similarity: Tensor | None = None

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

    def class_similarity_for(self, term: str) -> Tensor:
        """The similarity of the classes; ConfigError naming ``term`` where the batch has none."""
        if self.class_similarity is None:
            raise ConfigError(
                f"loss term {term!r} needs the similarity of the classes in the teacher's last layer but the batch has "
                "none: configure a teacher that ends in a linear layer."
            )
        return self.class_similarity


@dataclass(frozen=True)
class Term:
    """One summand of an objective.

    Attributes:
        name: under which its value is logged.
        weight: factor in the total, at least 0.
        function: mean over the batch, a scalar.
        labels: whether ``function`` reads none, one a row, or takes pairs of mixed images as well.
        diagnostics: further figures to be logged beside the term, scalars by name; none: nothing.
    """

    name: str
    weight: float
    function: Callable[[Signals], Tensor]
    labels: LabelUse = "none"
    diagnostics: Callable[[Signals], Mapping[str, Tensor]] | None = None


class LossParams(Params):
    """Parameters of a loss: what it needs, and the terms it consists of."""

    name: str
    """Which loss; ``loss=NAME`` sets it."""
    schedule: dict[str, Schedule] = Field(default_factory=dict)
    """Weights, temperatures and other fractions of this loss that change during training, by their key (the learning
    rate's schedule is ``train.optimizer.schedule``)."""

    @property
    def needs(self) -> frozenset[TeacherNeed]:
        """What of the teacher the loss reads; a cache that does not hold it is refused."""
        return frozenset()

    @property
    def topk_temperatures(self) -> frozenset[float]:
        """What the teacher's logits are divided by where its largest probabilities suffice (``needs`` has ``topk``)."""
        return frozenset()

    @property
    def couples_batch(self) -> bool:
        """Whether a row's gradient depends on the other rows, so that the batch size is part of the method."""
        return False

    @abstractmethod
    def terms(self) -> tuple[Term, ...]:
        """The terms, those of weight 0 included."""

    @property
    def changes(self) -> bool:
        """Whether anything changes during training."""
        return bool(self.schedule)

    def scheduled(self, progress: float) -> dict[str, float]:
        """What ``schedule`` sets after a share ``progress`` of training, 0 to 1, by key."""
        return {key: schedule.value(getattr(self, key), progress) for key, schedule in self.schedule.items()}

    def at(self, progress: float) -> Self:
        """The parameters after a share ``progress`` of training, 0 to 1."""
        return self.model_copy(update=self.scheduled(progress)) if self.schedule else self

    @property
    def wants_perturbation(self) -> bool:
        """Whether coefficients are to be selected from the teacher's validation logits when a run begins."""
        return False

    def with_perturbation(self, perturbation: Perturbation) -> Self:
        """The parameters with the coefficients that were selected, where they want some."""
        return self

    @property
    def needs_teacher(self) -> bool:
        return bool(self.needs)

    @property
    def needs_labels(self) -> bool:
        return bool(self.label_terms)

    @property
    def label_terms(self) -> tuple[str, ...]:
        """Names of the terms that read the labels at some time of training."""
        return self._terms_by_labels("one", "pair")

    @property
    def one_label_terms(self) -> tuple[str, ...]:
        """Names of those among them that know no pairs of mixed labels."""
        return self._terms_by_labels("one")

    def _terms_by_labels(self, *uses: LabelUse) -> tuple[str, ...]:
        used = [term.name for at in (0, 1) for term in self.at(at).terms() if term.labels in uses and term.weight > 0]
        return tuple(dict.fromkeys(used))

    @model_validator(mode="after")
    def _check_some_weight(self) -> Self:
        check_schedules(self, self.schedule)
        for progress in (0, 1):
            terms = self.at(progress).terms()
            if not any(term.weight > 0 for term in terms):
                when = f" at the {'end' if progress else 'beginning'} of training" if self.schedule else ""
                raise ValueError(
                    f"every term ({', '.join(term.name for term in terms)}) has weight 0{when}, so nothing is learnt; "
                    "raise one"
                )
        return self


class TeacherLossParams(LossParams):
    """Parameters of a loss that reads all of the teacher's logits."""

    @property
    def needs(self) -> frozenset[TeacherNeed]:
        return frozenset({"full"})


LOSSES: Registry[LossParams] = Registry("loss", "pipeline.losses")


class Objective:
    """Weighted sum of a loss's terms; those of weight 0 are not computed.

    Args:
        params: of the loss.
        class_similarity: (C, C) cosines of the rows of the teacher's last layer, for losses that need it.
    """

    def __init__(self, params: LossParams, class_similarity: Tensor | None = None) -> None:
        self._params = params
        self._class_similarity = class_similarity
        self._fixed = None if params.changes else _active(params)

    @property
    def label_terms(self) -> tuple[str, ...]:
        """Names of the terms that read the labels at some time of training."""
        return self._params.label_terms

    def __call__(self, signals: Signals, progress: float = 0.0) -> tuple[Tensor, dict[str, Tensor]]:
        """Computes the total and what it is made of, in float32 whatever autocast says (float64 stays float64).

        Args:
            signals: of the batch.
            progress: share of training that is done, 0 to 1, for losses with a schedule.

        Returns:
            The scalar ``sum(weight * term)``; and detached scalars to be logged: the unweighted value of each term
            by name, its diagnostics, what a schedule sets, and ``group_rows``, the size of the batch, where the
            loss couples its rows. No gradient reaches the teacher's logits.

        Raises:
            ConfigError: a term needs labels or teacher logits that the batch does not have.
            ModelError: student and teacher logits differ in shape.
        """
        signals = self._prepare(signals)
        terms = self._fixed
        if terms is None:
            terms = _active(self._params.at(progress))
        student = signals.student_logits
        logged: dict[str, Tensor] = {}
        total = student.new_zeros(())
        with torch.autocast(student.device.type, enabled=False):
            for term in terms:
                logged[term.name] = term.function(signals)
                total = total + term.weight * logged[term.name]
                if term.diagnostics is not None:
                    logged |= term.diagnostics(signals)
        # Filled on the device: a number that is copied there waits for all that the device has still to do.
        for key, value in self._params.scheduled(progress).items():
            logged[key] = student.new_full((), value)
        if self._params.couples_batch:
            logged["group_rows"] = student.new_full((), len(student))
        return total, {name: value.detach() for name, value in logged.items()}

    def _prepare(self, signals: Signals) -> Signals:
        """Widened logits, the teacher's without gradient; refuses logits of different shapes."""
        student, teacher = signals.student_logits, signals.teacher_logits
        if teacher is not None:
            if student.shape != teacher.shape:
                raise ModelError(
                    f"student logits have shape {tuple(student.shape)} and teacher logits {tuple(teacher.shape)} "
                    "(batch, classes): both must be trained for the same classes."
                )
            teacher = widen(teacher.detach())
        similarity = signals.class_similarity
        if similarity is None and self._class_similarity is not None:
            similarity = self._class_similarity = self._class_similarity.to(student.device)
        return replace(signals, student_logits=widen(student), teacher_logits=teacher, class_similarity=similarity)


def _active(params: LossParams) -> tuple[Term, ...]:
    return tuple(term for term in params.terms() if term.weight > 0)
