"""Evaluation on a split: every row exactly once, over any number of workers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.contracts.columns import INPUT, LABEL, InputSpec, SplitName
from pipeline.contracts.events import Emitter
from pipeline.data import DataSource, Decoder, SplitReader, iterate_rows
from pipeline.data.bad_rows import report_bad_rows
from pipeline.data.pixels.decode import BAD
from pipeline.errors import CheckpointError
from pipeline.evaluation import EvaluationParams, Tally
from pipeline.training.prefetch import host_tensor

PREFIXES: dict[SplitName, str] = {"train": "train", "validation": "val", "test": "test"}


def open_test(source: DataSource, reason: str) -> SplitReader:
    """The test split. The only way to its labels: whoever opens it has to say why.

    Args:
        source: the data set.
        reason: why test data is needed here, never empty; selection is never a reason.
    """
    if not reason:
        raise ValueError("opening test data needs a reason")
    return source.split("test")


class Reducer(Protocol):
    """The part of a worker context that evaluation needs."""

    rank: int
    world_size: int
    device: torch.device

    def sum_over_workers(self, values: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Evaluation:
    """Result of one pass over a split.

    Attributes:
        metrics: name (``val/top1``) to value.
        per_class: class name to accuracy; NaN where a class has no row.
    """

    metrics: dict[str, float]
    per_class: dict[str, float]


class EvaluationSet:
    """Rows of one split for one worker: rank, rank + world_size, ... decoded, not augmented.

    Decoded rows are kept when they are small, so that later passes cost no decoding. Rows that cannot be used are
    left out, where the decoder skips them.

    Args:
        spec: what the network is given, and the classes.
        decoder: of the split.
        reader: of the split; test only by ``open_test``.
        params: batch size of a pass.
        teacher_logits: (rows of the split, num_classes) in order of sample id, where known.
        emitter: is told of the rows that are left out.
    """

    MAX_KEPT_BYTES = 2**29

    def __init__(
        self,
        spec: InputSpec,
        decoder: Decoder,
        reader: SplitReader,
        split: SplitName,
        params: EvaluationParams,
        teacher_logits: np.ndarray | None = None,
        emitter: Emitter | None = None,
    ) -> None:
        self._spec, self._decoder, self._reader = spec, decoder, reader
        self.split = split
        self._batch_size = params.batch_size
        self._teacher_logits = teacher_logits
        self._on_bad = partial(report_bad_rows, emitter, split)
        self._kept: list[dict[str, Any]] | None = None
        if teacher_logits is not None and len(teacher_logits) != reader.num_rows:
            raise CheckpointError(
                f"the kept teacher logits have {len(teacher_logits)} rows but the {split} split has {reader.num_rows}; "
                "delete the file and run again"
            )

    def evaluate(self, network: nn.Module, worker: Reducer, autocast: bool = False) -> Evaluation:
        """Metrics of ``network`` (inputs to logits) over the whole split, the same on every worker."""
        spec = self._spec
        with_teacher = self._teacher_logits is not None
        tally = Tally(spec.num_classes, device=worker.device, with_teacher=with_teacher)
        was_training = network.training
        network.eval()
        start = worker.rank
        with torch.inference_mode(), torch.autocast(worker.device.type, dtype=torch.bfloat16, enabled=autocast):
            for rows in self._batches(worker.rank, worker.world_size):
                bad = rows[BAD]
                good = np.flatnonzero(~bad) if bad.any() else slice(None)  # picking rows copies them
                labels = host_tensor(rows[LABEL][good]).to(worker.device)
                logits = network(host_tensor(rows[INPUT][good]).to(worker.device))
                teacher = None
                if self._teacher_logits is not None:
                    stop = start + len(bad) * worker.world_size
                    shown = self._teacher_logits[start : stop : worker.world_size]
                    teacher = host_tensor(shown[good]).to(worker.device)
                    start = stop
                tally.update(logits, labels, teacher)
        network.train(was_training)
        tally.load(worker.sum_over_workers(tally.state()))
        names = spec.class_names
        return Evaluation(
            tally.compute(PREFIXES[self.split]),
            dict(zip(names, tally.per_class(), strict=True)),
        )

    def _batches(self, rank: int, world_size: int) -> Iterator[dict[str, Any]]:
        if self._kept is not None:
            yield from self._kept
            return
        kept: list[dict[str, Any]] | None = []
        size = 0
        batch_size, on_bad = self._batch_size, self._on_bad
        for rows in iterate_rows(self._decoder, self._reader, rank, world_size, batch_size, on_bad):
            size += rows[INPUT].nbytes
            if size > self.MAX_KEPT_BYTES:
                kept = None
            if kept is not None:
                kept.append(rows)
            yield rows
        self._kept = kept
