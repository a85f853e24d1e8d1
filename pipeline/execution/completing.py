"""A cache that is completed, for whatever command wants it: what is missing is computed by the teacher, and kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np

from pipeline.config.runs import Run
from pipeline.config.stored import write_text
from pipeline.contracts.columns import INPUT, SAMPLE_ID, SplitName
from pipeline.contracts.events import Event, RowEvents
from pipeline.data import DataSource, SplitReader, decode_block, read_blocks
from pipeline.data.bad_rows import report_bad_rows
from pipeline.data.cache import (
    Cache,
    CacheBuild,
    CacheKey,
    PartAssembler,
    PartBlocks,
    estimate_bytes,
    measure_topk_error,
    open_build,
)
from pipeline.data.logits import load_logits
from pipeline.execution.caching import cache_folder, cache_key, describe_origin
from pipeline.execution.joining import join_cluster
from pipeline.execution.logits import LogitsHere, Streams, teacher_accuracy
from pipeline.execution.session import RunSession
from pipeline.execution.teacher import CheckedTeacher
from pipeline.execution.ways import list_demands
from pipeline.report.cache import format_bytes, render_topk_errors
from pipeline.training import open_training


@dataclass(frozen=True)
class CacheWork:
    """A cache to be made for a run, of whatever command.

    Attributes:
        reader: the training split.
        key: of the cache.
    """

    run: Run
    source: DataSource
    teacher: CheckedTeacher
    reader: SplitReader
    key: CacheKey

    @property
    def folder(self) -> str:
        return cache_folder(self.run.config, self.key)


def prepare_cache(run: Run, source: DataSource, teacher: CheckedTeacher | None) -> CacheWork:
    """The cache of a run's configuration; what is wrong with its folder shows now."""
    assert teacher is not None  # the command asks for one
    work = CacheWork(run, source, teacher, open_training(source), cache_key(run.config, source, teacher))
    open_build(run.config.cache.path or "", work.key, work.reader).close()
    return work


def complete_cache(work: CacheWork, session: RunSession) -> tuple[Cache, dict[str, int]]:
    """Computes what is missing of a cache; one that is complete is left as it is.

    Returns:
        the cache; how many rows were ``computed`` now, and how many the teacher's forward call counted
        (``forwarded``), those included that fill up the last block of each view.
    """
    with open_build(work.run.config.cache.path or "", work.key, work.reader) as build:
        places = build.find_missing_parts()
        _announce(work, build, len(places), session)
        rows = {"computed": 0, "forwarded": 0}
        cache = build.cache
        if cache is None:
            with open_teacher(work, session) as teacher:
                session.began = True
                accuracy = _measure_teacher(work, teacher, session)
                if places:
                    blocks = PartBlocks(build.layout, tuple(places), work.run.config.train.batch_size)
                    session.say("logits", detail=f"{blocks.num_rows:,} rows, {len(places):,} parts")
                    rows = {"computed": blocks.num_rows, "forwarded": teacher.write(build, blocks)}
                    session.say("logits", "finished")
            session.say("sealing", detail="reading and checking every part")
            counted = {f"rows_{name}_last": number for name, number in rows.items()}
            cache = build.seal(accuracy, describe_origin(work.run) | counted)
            session.say("sealing", "finished")
        return cache, rows


def _announce(work: CacheWork, build: CacheBuild, num_missing: int, session: RunSession) -> None:
    num_parts = work.key.num_views * len(build.layout.indexes)
    size = estimate_bytes(
        work.reader.num_rows, work.key.num_views, work.key.num_classes, work.key, len(build.layout.indexes)
    )
    present = "" if num_missing == num_parts else f"; {num_parts - num_missing:,} parts are there already"
    session.say(
        "cache",
        detail=f"{work.folder}: {work.key.num_views} views of {work.reader.num_rows:,} rows, about "
        f"{format_bytes(size)} in {num_parts:,} parts{present}",
    )


def _measure_teacher(work: CacheWork, teacher: _Teacher, session: RunSession) -> float | None:
    """Accuracy on validation; for a top-k cache also what it loses, on the same rows."""
    path = teacher.compute("validation", work.source.split("validation"))
    logits = load_logits(path) if work.key.format == "topk" else np.empty((0, 1))
    logits = logits[np.isfinite(logits).all(axis=1)]
    if len(logits):
        table = render_topk_errors(measure_topk_error(logits, work.key), work.key)
        file = work.run.dir / "topk_errors.txt"
        write_text(file, table)
        session.journal.emit(Event("artifact", {"path": str(file), "folder": "cache"}))
        session.say("top-k", "measured", f"on {len(logits):,} validation rows:\n{table}")
    return teacher_accuracy(work.source, path)


# --- the teacher --------------------------------------------------------------------------------------------------


class _Teacher(Protocol):
    def compute(self, split: SplitName, reader: SplitReader) -> Path:
        """The file with its logits on a split."""
        ...

    def write(self, build: CacheBuild, blocks: PartBlocks) -> int:
        """Computes and writes parts; returns the rows that its forward call counted."""
        ...


@contextmanager
def open_teacher(work: CacheWork, session: RunSession) -> Iterator[_Teacher]:
    """The teacher of a cache's run, in this process or in a pool."""
    config = work.run.config
    if config.cluster.name == "inprocess":
        yield _Here(work, session)
        return
    with join_cluster(work.run, session, list_demands(config, "cache build"), "pool") as drain:
        yield _Pool(work, Streams(config, work.source, work.teacher, session, drain.emitter))


class _Here:
    """The teacher in this process."""

    def __init__(self, work: CacheWork, session: RunSession) -> None:
        self._work, self._session = work, session
        self._logits = LogitsHere(work.run.config, work.source, work.teacher, session)

    def compute(self, split: SplitName, reader: SplitReader) -> Path:
        return self._logits.compute(split, reader)

    def write(self, build: CacheBuild, blocks: PartBlocks) -> int:
        work, teacher, before = self._work, self._logits.teacher, self._logits.teacher.rows_forwarded
        augment, seed = work.run.config.data.augment, work.run.config.view_seed
        decoder, on_bad = work.source.decoder("train"), partial(report_bad_rows, self._session.skipped, "train")
        assembler, progress = PartAssembler(blocks, build.writer), RowEvents(self._session.journal, blocks.num_rows)
        for plan in blocks.plans(0, blocks.num_blocks):
            table = read_blocks(work.reader, [plan], augment, seed)
            rows = decode_block(table, decoder, augment, seed, on_bad, substitute=False)
            progress.advance(assembler.add(rows[SAMPLE_ID], teacher(rows[INPUT])))
        return teacher.rows_forwarded - before


class _Pool:
    """The teacher pool on Ray."""

    def __init__(self, work: CacheWork, streams: Streams) -> None:
        self._work, self._streams = work, streams

    def compute(self, split: SplitName, reader: SplitReader) -> Path:
        return self._streams.compute(split, reader)

    def write(self, build: CacheBuild, blocks: PartBlocks) -> int:
        from pipeline.cluster.logits import write_pool_parts
        from pipeline.cluster.stream import CacheBlocks

        config, reader = self._work.run.config, self._work.reader
        rows = CacheBlocks(reader, blocks, config.data.augment, config.view_seed)
        return write_pool_parts(self._streams.make(rows, "train", reader), blocks, build.writer)
