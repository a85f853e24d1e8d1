"""Cross-entropy with the labels."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from pipeline.losses.objective import LOSSES, LossParams, Signals, Term
from pipeline.losses.tensors import Labels, Logits, Scalar, Weights, widen


def cross_entropy(
    student_logits: Logits,
    labels: Labels,
    *,
    label_smoothing: float = 0.0,
    partner_labels: Labels | None = None,
    label_weights: Weights | None = None,
) -> Scalar:
    """How surprised the student is by the labels.

    ``-sum_k q_k log softmax(z_s)_k`` with ``q = (1 - label_smoothing) * p + label_smoothing / C``, where ``p`` is
    ``onehot(y)``, or ``w * onehot(y) + (1 - w) * onehot(partner)`` where two images were mixed.

    Args:
        student_logits: (B, C) logits.
        labels: (B,) class numbers in 0..C-1.
        label_smoothing: in [0, 1]; 0 is the plain cross-entropy.
        partner_labels: (B,) class numbers in 0..C-1 of the images mixed in; none: not mixed.
        label_weights: (B,) in [0, 1], the weight ``w`` of ``labels``; given with ``partner_labels``.

    Returns:
        Scalar, nats, sum over classes and mean over the batch, at least 0.

    Label smoothing: Szegedy et al., arXiv 1512.00567. Mixed labels: Zhang et al., arXiv 1710.09412. Unlike
    ``torch.nn.functional.cross_entropy`` there is no label that is ignored: one outside 0..C-1 is an error
    (in training one sentence, before the step).
    """
    if (partner_labels is None) != (label_weights is None):
        raise ValueError("partner_labels and label_weights are given together or not at all")
    log_probabilities = torch.log_softmax(widen(student_logits), dim=1)
    on_label = -log_probabilities.gather(1, labels[:, None]).squeeze(1)
    if partner_labels is not None and label_weights is not None:
        on_partner = -log_probabilities.gather(1, partner_labels[:, None]).squeeze(1)
        weights = label_weights.to(on_label.dtype)
        on_label = weights * on_label + (1 - weights) * on_partner
    on_uniform = -log_probabilities.mean(dim=1)
    return ((1 - label_smoothing) * on_label + label_smoothing * on_uniform).mean()


def label_term(signals: Signals, name: str, label_smoothing: float = 0.0) -> Scalar:
    """``cross_entropy`` of a batch, mixed or not, as the term ``name`` of an objective."""
    labels, partner_labels, label_weights = signals.label_pairs_for(name)
    return cross_entropy(
        signals.student_logits,
        labels,
        label_smoothing=label_smoothing,
        partner_labels=partner_labels,
        label_weights=label_weights,
    )


@LOSSES.register
class CrossEntropyParams(LossParams):
    """Cross-entropy with the labels; no teacher."""

    name: Literal["cross_entropy"] = "cross_entropy"
    label_smoothing: float = Field(default=0.0, ge=0, le=1)
    """Share of the target spread evenly over all classes (arXiv 1512.00567); 0: none."""

    def terms(self) -> tuple[Term, ...]:
        def ce(signals: Signals) -> Scalar:
            return label_term(signals, "ce", self.label_smoothing)

        return (Term("ce", 1.0, ce, labels="pair"),)
