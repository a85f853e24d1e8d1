"""The teacher's logits on a whole split, by the pool or in this process, kept beside the runs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipeline.config.schema import Config
from pipeline.contracts.columns import SplitName
from pipeline.contracts.events import Emitter
from pipeline.data import DataSource, SplitReader
from pipeline.data.logits import load_logits, save_logits
from pipeline.execution.pool import estimate_block_bytes, make_pool_plan, pool_device, stream_limits
from pipeline.execution.session import RunSession
from pipeline.execution.teacher import CheckedTeacher, compute_dtype
from pipeline.models import Teacher
from pipeline.training import compute_logits, teacher_arguments

if TYPE_CHECKING:  # importing ray takes seconds, and not every way needs it
    from pipeline.cluster.stream import BlockReader, PoolPlan, StreamPlan


def logits_path(
    run_dir: Path, teacher: CheckedTeacher, source: DataSource, split: SplitName, reader: SplitReader
) -> Path:
    """Where the teacher's logits on a split are kept: beside the runs, by all that they depend on."""
    rows = hashlib.sha256(reader.sample_ids.tobytes()).hexdigest()[:12]
    return run_dir.parent / "teacher_logits" / f"{teacher.key}-{source.fingerprint[:16]}" / f"{split}-{rows}.npy"


def teacher_accuracy(source: DataSource, path: Path) -> float | None:
    """Share of the validation rows whose label is the teacher's likeliest class; none where no row can be used.

    Args:
        path: of the file with the teacher's logits on validation.
    """
    logits, labels = load_logits(path), source.split("validation").read_labels()
    usable = np.isfinite(logits).all(axis=1)
    return float((logits[usable].argmax(axis=1) == labels[usable]).mean()) if usable.any() else None


def teacher_here(config: Config, source: DataSource) -> Teacher:
    """The teacher in this process, with the precision that it has, or would have, where the run asks it.

    On the GPU of the process, if it has one, unless the run's teacher is a pool without GPUs: Ray does not hide them.
    """
    params = config.teacher.model_copy(update={"precision": compute_dtype(config)})
    device = "cpu" if config.cluster.name != "inprocess" and not config.teacher.pool.num_gpus else None
    return Teacher(**teacher_arguments(params, source, config.train.batch_size, device))


@dataclass(frozen=True)
class LogitsHere:
    """The teacher in this process."""

    config: Config
    source: DataSource
    checked: CheckedTeacher
    session: RunSession

    @cached_property
    def teacher(self) -> Teacher:
        return teacher_here(self.config, self.source)

    def compute(self, split: SplitName, reader: SplitReader) -> Path:
        """The file with the logits of a split; what an earlier run has kept is used."""
        path = logits_path(self.session.run.dir, self.checked, self.source, split, reader)
        if not path.exists():
            self.session.say("teacher logits", detail=f"{split}, {reader.num_rows:,} rows")
            batch_size = self.config.train.batch_size
            save_logits(path, compute_logits(self.teacher, self.source.decoder(split), reader, batch_size))
            self.session.say("teacher logits", "finished")
        return path


@dataclass(frozen=True)
class Streams:
    """Streams of a run on Ray, with the teacher pool where there is a teacher.

    Attributes:
        emitter: where the pool's actors record their use, and decode tasks the rows that they skip.
    """

    config: Config
    source: DataSource
    checked: CheckedTeacher | None
    session: RunSession
    emitter: Emitter

    def make(self, blocks: BlockReader, split: SplitName, reader: SplitReader, blocks_per_step: int = 1) -> StreamPlan:
        """The stream of ``blocks``, which are rows of ``reader``."""
        from pipeline.cluster.stream import StreamPlan, share

        config = self.config
        batch_size, augment = config.train.batch_size, config.data.augment
        return StreamPlan(
            blocks=share(blocks),
            batch_size=batch_size,
            block_bytes=estimate_block_bytes(self.source.spec, batch_size, reader, with_partners=augment.mixes),
            decoder=self.source.decoder(split),
            augment=augment,
            seed=config.view_seed,
            pool=self._pool(),
            emitter=self.emitter,
            blocks_per_step=blocks_per_step,
            split=split,
            **stream_limits(config, None if self.checked is None else "teacher actor"),
        )

    def compute(self, split: SplitName, reader: SplitReader, check: Callable[[], None] | None = None) -> Path:
        """As ``LogitsHere.compute``, by the pool.

        Args:
            check: called before the pool is needed.
        """
        from pipeline.cluster.logits import write_pool_logits
        from pipeline.cluster.stream import SplitBlocks, whole_split

        assert self.checked is not None
        path = logits_path(self.session.run.dir, self.checked, self.source, split, reader)
        if not path.exists():
            if check is not None:
                check()
            self.session.say("teacher logits", detail=f"{split}, {reader.num_rows:,} rows")
            blocks = SplitBlocks(reader, self.config.train.batch_size)
            write_pool_logits(whole_split(self.make(blocks, split, reader)), reader.num_rows, path)
            self.session.say("teacher logits", "finished")
        return path

    def _pool(self) -> PoolPlan | None:
        if self.checked is None:
            return None
        pool = self.config.teacher.pool
        arguments = teacher_arguments(self.config.teacher, self.source, self.config.train.batch_size, pool_device(pool))
        return make_pool_plan(pool, arguments, self.checked.fingerprint)
