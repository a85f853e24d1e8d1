"""What losses have in common that soften both sides' probabilities."""

from __future__ import annotations

from torch import Tensor

from pipeline.losses.objective import Signals, TeacherLossParams
from pipeline.losses.standardise import standardise


class SoftenedLossParams(TeacherLossParams):
    """Parameters of a loss of softened probabilities."""

    standardise: bool = False
    """Standardise both sides' logits in each row first (arXiv 2403.01427, which takes kd at temperature 2 to 4 with
    a kd_weight of 1 to 18)."""

    def logits_of(self, signals: Signals, term: str) -> tuple[Tensor, Tensor]:
        """Student's and teacher's logits (B, C) as the loss takes them; ConfigError naming ``term`` without teacher."""
        student, teacher = signals.student_logits, signals.teacher_logits_for(term)
        return (standardise(student), standardise(teacher)) if self.standardise else (student, teacher)
