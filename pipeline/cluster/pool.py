"""The teacher pool's actor. Torch is imported when an actor is built, not when this module is."""

from __future__ import annotations

import os
import pickle
import time
from typing import Any

import numpy as np

from pipeline.cluster.journal import QueueEmitter
from pipeline.contracts.columns import BLOCK, INPUT, LABEL, LABEL_WEIGHT, PARTNER_LABEL, SAMPLE_ID, TEACHER_LOGITS, VIEW
from pipeline.contracts.events import Event
from pipeline.data.cache import FillWriter
from pipeline.data.waiting import tell_waits
from pipeline.errors import CheckpointError

_REPORT_EVERY_S = 2.0
KEPT_COLUMNS = (BLOCK, VIEW, SAMPLE_ID, LABEL, INPUT)
MIXED_COLUMNS = (PARTNER_LABEL, LABEL_WEIGHT)  # only where images are mixed
ROWS_FORWARDED = (
    "rows_forwarded"  # int64, the same in all rows of a block: rows that the teacher's forward call counted
)


class TeacherActor:
    """Adds the teacher's logits to blocks; a thin shell around ``pipeline.models.Teacher``.

    Args:
        build: pickled arguments of ``Teacher``, as bytes so that the processes which only pass them
            on need not import torch.
        emitter: takes a record of the pool's use every two seconds, and what is waited for.
        num_threads: torch's CPU threads.
        logits_only: leave the inputs out of the result, and tell how many rows the teacher was asked for.
        fingerprint: what the weights must be; none: not compared.
        fill: keeps the logits of every block, for a cache that is filled while training.

    Raises:
        CheckpointError: the checkpoint holds other weights than when the run began.
    """

    def __init__(
        self,
        build: bytes,
        emitter: QueueEmitter | None,
        num_threads: int,
        logits_only: bool = False,
        fingerprint: str | None = None,
        fill: FillWriter | None = None,
    ) -> None:
        import torch

        from pipeline.models import Teacher

        torch.set_num_threads(num_threads)
        self._teacher = Teacher(**pickle.loads(build))
        if fingerprint is not None and self._teacher.fingerprint != fingerprint:
            raise CheckpointError(
                f"the teacher's checkpoint now has fingerprint {self._teacher.fingerprint}, at the start of the run it "
                f"had {fingerprint}; put the old weights back and resume, or start a new run"
            )
        self._emitter = emitter
        tell_waits(emitter)
        self._fill = fill
        self._logits_only = logits_only
        self._columns = (BLOCK, SAMPLE_ID) if logits_only else KEPT_COLUMNS
        self._optional = () if logits_only else MIXED_COLUMNS
        self._name = f"{os.uname().nodename}:{os.getpid()}"
        self._since, self._rows, self._busy_s = time.perf_counter(), 0, 0.0

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        started = time.perf_counter()
        before = self._teacher.rows_forwarded
        logits = self._teacher(batch[INPUT])
        self._busy_s += time.perf_counter() - started
        if self._fill is not None:  # before anybody sees the block: what was trained on is there when it is asked for
            self._fill.write(int(batch[BLOCK][0]), int(batch[VIEW][0]), batch[SAMPLE_ID], logits)
        self._rows += len(logits)
        self._report()
        mixed = tuple(name for name in self._optional if name in batch)
        kept = {**{name: batch[name] for name in self._columns + mixed}, TEACHER_LOGITS: logits}
        if self._logits_only:
            kept[ROWS_FORWARDED] = np.full(len(logits), self._teacher.rows_forwarded - before)
        return kept

    def _report(self) -> None:
        elapsed = time.perf_counter() - self._since
        if self._emitter is None or elapsed < _REPORT_EVERY_S:
            return
        self._emitter.emit(
            Event(
                "pool",
                {
                    "actor": self._name,
                    "rows": self._rows,
                    "rows_per_s": self._rows / elapsed,
                    "busy": self._busy_s / elapsed,
                },
            )
        )
        self._since, self._rows, self._busy_s = time.perf_counter(), 0, 0.0
