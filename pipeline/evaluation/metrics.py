"""Metrics of a classifier as sums, so that batches and workers add up to the same figures."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from pipeline.errors import DataError, ModelError

METRIC_DIRECTIONS: dict[str, Literal["max", "min"]] = {
    "top1": "max",
    "top5": "max",
    "nll": "min",
    "brier": "min",
    "ece": "min",
    "agreement": "max",
    "teacher_kl": "min",
}
"""Every metric that can select a checkpoint, and which way is better."""

TEACHER_METRICS = frozenset({"agreement", "teacher_kl"})
"""Those that only a tally with the teacher's logits computes."""

_NUM_BINS = 15
_SCALARS = ("num_rows", "top1", "top5", "nll", "brier", "agreement", "teacher_kl")


class Tally:
    """Running sums over evaluated rows, in float64.

    The state is one vector that adds up: any split of the rows over tallies gives the same counts, and the
    sum of their states is the state of all rows. Ties between logits go to the lowest class number; a row
    with a NaN among its logits is never correct, and makes the averages (nll, brier, ece) NaN.

    Args:
        num_classes: columns of the logits.
        device: where the sums are kept, that of the logits.
        with_teacher: whether rows come with the teacher's logits.
    """

    def __init__(self, num_classes: int, device: torch.device | str = "cpu", with_teacher: bool = False) -> None:
        self.num_classes = num_classes
        self.with_teacher = with_teacher
        self._state = torch.zeros(len(_SCALARS) + 3 * _NUM_BINS + 2 * num_classes, dtype=torch.float64, device=device)
        sizes = [len(_SCALARS), 3 * _NUM_BINS, 2 * num_classes]
        scalars, bins, classes = torch.split(self._state, sizes)  # views: adding to them adds to the state
        self._scalars = scalars  # sums in the order of _SCALARS
        self._bins = bins.view(_NUM_BINS, 3)  # rows, confidence, correct
        self._classes = classes.view(num_classes, 2)  # rows, correct

    @torch.no_grad()
    def update(self, student_logits: Tensor, labels: Tensor, teacher_logits: Tensor | None = None) -> None:
        """Adds rows.

        Args:
            student_logits: (B, C).
            labels: (B,) int64 class numbers.
            teacher_logits: (B, C), exactly where the tally is one ``with_teacher``.

        Raises:
            ModelError: logits of another shape than (B, num_classes).
        """
        if self.with_teacher != (teacher_logits is not None):
            raise ValueError(f"with_teacher={self.with_teacher} but teacher_logits is {type(teacher_logits).__name__}")
        student = self._check(student_logits, labels, "student")
        log_probabilities = torch.log_softmax(student, dim=1)
        probabilities = log_probabilities.exp()
        nll = -log_probabilities.gather(1, labels[:, None]).squeeze(1)
        residual = probabilities.scatter_add(1, labels[:, None], -torch.ones_like(nll)[:, None])
        rank = _rank_of_label(student, labels)
        correct = (rank == 0).double()

        sums = [torch.ones_like(nll), correct, (rank < 5).double(), nll, residual.square().sum(dim=1)]
        if teacher_logits is None:
            sums += [torch.zeros_like(nll)] * 2
        else:
            teacher = self._check(teacher_logits, labels, "teacher")
            teacher_log_probabilities = torch.log_softmax(teacher, dim=1)
            gap = teacher_log_probabilities - log_probabilities
            agrees = (student.argmax(dim=1) == teacher.argmax(dim=1)) & ~student.isnan().any(dim=1)
            sums += [agrees.double(), (teacher_log_probabilities.exp() * gap).sum(dim=1)]
        self._scalars += torch.stack(sums).sum(dim=1)

        confidence = probabilities.amax(dim=1)
        # Bins are (low, high]; a matrix product adds in a fixed order, which index_add_ on a GPU does not.
        bins = (confidence.nan_to_num() * _NUM_BINS).ceil().long().sub(1).clamp(0, _NUM_BINS - 1)
        one_hot = torch.nn.functional.one_hot(bins, _NUM_BINS).double()
        self._bins += one_hot.T @ torch.stack([torch.ones_like(confidence), confidence, correct], dim=1)
        self._classes.index_add_(0, labels, torch.stack([torch.ones_like(correct), correct], dim=1))

    def _check(self, logits: Tensor, labels: Tensor, whose: str) -> Tensor:
        if logits.shape != (len(labels), self.num_classes):
            raise ModelError(
                f"{whose} logits have shape {tuple(logits.shape)} where ({len(labels)}, {self.num_classes}) "
                "(rows, classes) is expected: the network was built for other classes than the data has."
            )
        return logits.detach().double()

    def state(self) -> Tensor:
        """The sums, a 1-D float64 copy to be added over workers."""
        return self._state.clone()

    def load(self, state: Tensor) -> None:
        """Replaces the sums by ``state``."""
        if state.shape != self._state.shape:
            raise ValueError(f"state of shape {tuple(state.shape)}, expected {tuple(self._state.shape)}")
        self._state.copy_(state)

    def compute(self, prefix: str = "val") -> dict[str, float]:
        """The metrics, as ``prefix/name``.

        ``top1``, ``top5`` (top C below five classes), ``nll`` (nats), ``brier`` (squared error summed over
        classes), ``ece`` (15 equal bins of the top-1 confidence), ``num_rows``; with a teacher ``agreement``
        (same top-1 class) and ``teacher_kl`` (KL(teacher || student) at temperature 1, nats).

        Raises:
            DataError: there are no rows.
        """
        num_rows = self._scalars[0]
        if num_rows == 0:
            raise DataError(f"no rows to compute {prefix} metrics from: the split is empty; give it rows.")
        _, confidence, correct = self._bins.unbind(dim=1)
        means = dict(zip(_SCALARS[1:], (self._scalars[1:] / num_rows).tolist(), strict=True))
        means["ece"] = ((confidence - correct).abs().sum() / num_rows).item()
        names = [name for name in METRIC_DIRECTIONS if self.with_teacher or name not in TEACHER_METRICS]
        return {f"{prefix}/{name}": means[name] for name in names} | {f"{prefix}/num_rows": num_rows.item()}

    def per_class(self) -> list[float]:
        """Accuracy of each class's rows, NaN for a class without rows."""
        rows, correct = self._classes.unbind(dim=1)
        accuracies: list[float] = (correct / rows).tolist()
        return accuracies


def _rank_of_label(logits: Tensor, labels: Tensor) -> Tensor:
    """(B,) how many classes come before the label's: higher logit, or equal and lower number; C where any is NaN.

    ``topk`` would leave the order of ties to the device.
    """
    num_classes = logits.shape[1]
    own = logits.gather(1, labels[:, None])
    before = torch.arange(num_classes, device=logits.device) < labels[:, None]
    rank = ((logits > own) | ((logits == own) & before)).sum(dim=1)
    return rank.masked_fill(logits.isnan().any(dim=1), max(num_classes, 5))
