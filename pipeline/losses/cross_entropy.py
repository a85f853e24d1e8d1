"""Cross-entropy with the labels."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from pipeline.losses.objective import LOSSES, Labels, Logits, LossParams, Scalar, Signals, Term, widen


def cross_entropy(student_logits: Logits, labels: Labels, *, label_smoothing: float = 0.0) -> Scalar:
    """How surprised the student is by the labels.

    ``-sum_k q_k log softmax(z_s)_k`` with ``q = (1 - label_smoothing) * onehot(y) + label_smoothing / C``.

    Args:
        student_logits: (B, C) logits.
        labels: (B,) class numbers in 0..C-1.
        label_smoothing: in [0, 1]; 0 is the plain cross-entropy.

    Returns:
        Scalar, nats, sum over classes and mean over the batch, at least 0.

    Label smoothing: Szegedy et al., arXiv 1512.00567. Unlike ``torch.nn.functional.cross_entropy``
    there is no label that is ignored: one outside 0..C-1 is an error.
    """
    log_probabilities = torch.log_softmax(widen(student_logits), dim=1)
    on_label = -log_probabilities.gather(1, labels[:, None]).squeeze(1)
    on_uniform = -log_probabilities.mean(dim=1)
    return ((1 - label_smoothing) * on_label + label_smoothing * on_uniform).mean()


@LOSSES.register
class CrossEntropyParams(LossParams):
    """Cross-entropy with the labels; no teacher."""

    name: Literal["cross_entropy"] = "cross_entropy"
    label_smoothing: float = Field(default=0.0, ge=0, le=1)
    """Share of the target spread evenly over all classes (arXiv 1512.00567); 0: none."""

    def terms(self) -> tuple[Term, ...]:
        def ce(signals: Signals) -> Scalar:
            return cross_entropy(signals.student_logits, signals.labels_for("ce"), label_smoothing=self.label_smoothing)

        return (Term("ce", 1.0, ce, uses_labels=True),)
