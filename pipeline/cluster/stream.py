"""The stream: one Ray Dataset from the resume point to the end of the run, in exact order.

    read tasks (rows in training order, still encoded)
      -> repartition into blocks of exactly one batch (Ray Data merges and splits what tasks yield)
      -> decode and augment, one block a task
      -> the teacher pool
      -> split: with order kept and equal blocks, block i goes to worker i mod world_size

A run of very many blocks is a chain of segments, each a dataset of its own, because planning costs
time and memory by the read task.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import ray
import ray.data
from ray.data import ActorPoolStrategy, Dataset, Datasource

from pipeline.cluster.pool import TeacherActor
from pipeline.cluster.preflight import Demand
from pipeline.cluster.ray_internals import (
    BlockMetadata,
    DataContext,
    ExecutionOptions,
    ExecutionResources,
    ReadTask,
    allow_actor_options,
)
from pipeline.contracts.columns import BLOCK, INPUT, LABEL, LABEL_WEIGHT, PARTNER_LABEL, SAMPLE_ID, TEACHER_LOGITS
from pipeline.contracts.events import Emitter
from pipeline.data import AugmentParams, BlockPlan, BlockPlanner, Decoder, SplitReader, decode_block, read_blocks
from pipeline.data.bad_rows import report_bad_rows
from pipeline.data.cache import FillWriter, LogitsDecoder, LogitsReader, PartBlocks
from pipeline.data.waiting import tell_waits

MAX_BLOCKS_PER_TASK = 8
MIN_BLOCKS_PER_TASK = 2
MAX_TASK_BYTES = 100 * 2**20
TASKS_PER_SEGMENT = 5_000


class BlockReader(Protocol):
    """Rows of consecutive blocks, as one table with the columns of an encoded block."""

    def read(self, first: int, stop: int) -> pa.Table: ...


@dataclass(frozen=True)
class TrainingBlocks:
    """Blocks of the training split in the order of the run.

    Attributes:
        augment, seed: as in ``StreamPlan``.
        logits: of a cache, where they are read with the rows.
    """

    reader: SplitReader
    planner: BlockPlanner
    augment: AugmentParams | None = None
    seed: int = 0
    logits: LogitsReader | None = None

    def read(self, first: int, stop: int) -> pa.Table:
        return read_blocks(self.reader, self.planner.blocks(first, stop), self.augment, self.seed, self.logits)


@dataclass(frozen=True)
class CacheBlocks:
    """Blocks of the rows whose logits a cache lacks; ``augment`` and ``seed`` as in ``StreamPlan``."""

    reader: SplitReader
    blocks: PartBlocks
    augment: AugmentParams
    seed: int

    def read(self, first: int, stop: int) -> pa.Table:
        return read_blocks(self.reader, self.blocks.plans(first, stop), self.augment, self.seed)


@dataclass(frozen=True)
class SplitBlocks:
    """Blocks of a split in the order of its sample ids, each row once; the last may be short."""

    reader: SplitReader
    batch_size: int

    def read(self, first: int, stop: int) -> pa.Table:
        ids = self.reader.sample_ids
        plans = (
            BlockPlan(index, 0, 0, ids[index * self.batch_size : (index + 1) * self.batch_size])
            for index in range(first, stop)
        )
        return read_blocks(self.reader, plans)


@dataclass(frozen=True)
class PoolPlan:
    """How the teacher pool runs; see ``TeacherActor`` for ``build``, ``fingerprint`` and ``fill``."""

    build: bytes
    min_size: int
    max_size: int
    actor_options: dict[str, Any]
    num_threads: int
    fingerprint: str | None = None
    fill: FillWriter | None = None


@dataclass(frozen=True)
class StreamPlan:
    """All that is needed to build the stream in any process, small enough to pass by value.

    Attributes:
        blocks: reference to a ``BlockReader`` in the object store, put there once.
        batch_size: rows of a block.
        block_bytes: size of a block, decoded or encoded, whichever is larger, for Ray Data's limits.
        decoder, augment, seed: what the decode tasks do.
        pool: the teacher pool; none where no teacher is needed, or its logits come with the rows.
        logits: decodes logits that come with the rows, out of a cache.
        emitter: takes what processes tell: the use of the pool, rows that are skipped, storage that is waited for.
        max_read_tasks: reads in parallel.
        max_decode_tasks: decodes in parallel; none: as many as there are CPUs left.
        object_store_bytes: share of the object store for the stream; none: Ray Data's default.
        no_progress_timeout_s: how long an execution may stand still before it is an error.
        blocks_per_step: blocks of an optimizer step; the number of workers divides it.
        logits_only: the pool's output leaves the inputs out, and nothing stands in for a row that cannot be used.
        split: the rows are of, for the record.
        demands: what the cluster must have for the stream to go on.
    """

    blocks: ray.ObjectRef[Any]
    batch_size: int
    block_bytes: int
    decoder: Decoder
    augment: AugmentParams
    seed: int
    pool: PoolPlan | None
    logits: LogitsDecoder | None = None
    emitter: Any = None
    max_read_tasks: int = 2
    max_decode_tasks: int | None = None
    object_store_bytes: int | None = None
    no_progress_timeout_s: float = 1_800.0
    blocks_per_step: int = 1
    logits_only: bool = False
    split: str = "train"
    demands: tuple[Demand, ...] = ()

    @property
    def blocks_per_task(self) -> int:
        """2 to 8 blocks, up to 100 MB: longer runs read far ahead and spill."""
        return max(MIN_BLOCKS_PER_TASK, min(MAX_BLOCKS_PER_TASK, MAX_TASK_BYTES // max(self.block_bytes, 1)))

    @property
    def blocks_per_segment(self) -> int:
        """A multiple of a step's blocks, or the splitter would cut the last ones of a segment into parts."""
        return max(self.blocks_per_task * TASKS_PER_SEGMENT // self.blocks_per_step, 1) * self.blocks_per_step


def share(value: Any) -> ray.ObjectRef[Any]:
    """Puts a reader or data source, with the table it may hold, into the object store: one copy a node."""
    return ray.put(value)


class _BlockSource(Datasource):
    """Read tasks over ``[first, stop)`` blocks; a task captures two numbers, not the permutation."""

    def __init__(self, plan: StreamPlan, first: int, stop: int) -> None:
        super().__init__()
        self._plan, self._first, self._stop = plan, first, stop

    def get_name(self) -> str:
        return "TrainingBlocks"

    def estimate_inmemory_data_size(self) -> int:
        return (self._stop - self._first) * self._plan.block_bytes

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: DataContext | None = None
    ) -> list[ReadTask]:
        plan, step = self._plan, self._plan.blocks_per_task
        tasks = []
        for first in range(self._first, self._stop, step):
            stop = min(first + step, self._stop)
            rows, num_bytes = (stop - first) * plan.batch_size, (stop - first) * plan.block_bytes
            metadata = BlockMetadata(num_rows=rows, size_bytes=num_bytes, input_files=None, exec_stats=None)
            tasks.append(ReadTask(partial(_read_task, plan.blocks, plan.emitter, first, stop), metadata))
        return tasks


def _read_task(blocks: ray.ObjectRef[Any], emitter: Emitter | None, first: int, stop: int) -> Iterable[pa.Table]:
    tell_waits(emitter)
    reader: BlockReader = ray.get(blocks)
    yield reader.read(first, stop)


def _decode_task(
    table: pa.Table,
    decoder: Decoder,
    augment: AugmentParams,
    seed: int,
    emitter: Emitter | None,
    split: str,
    substitute: bool,
    logits: LogitsDecoder | None,
) -> dict[str, np.ndarray]:
    on_bad = partial(report_bad_rows, emitter, split)
    return decode_block(table, decoder, augment, seed, on_bad, substitute=substitute, logits=logits)


def build_stream(plan: StreamPlan, first: int, stop: int) -> Dataset:
    """The dataset of blocks ``first`` to ``stop`` (exclusive) of the run; nothing runs yet."""
    num_blocks = max(stop - first, 1)
    num_tasks = -(-num_blocks // plan.blocks_per_task)
    context = DataContext.get_current()
    configure_context(context, plan)
    dataset = ray.data.read_datasource(
        _BlockSource(plan, first, stop),
        override_num_blocks=num_tasks,
        concurrency=min(plan.max_read_tasks, num_tasks),  # Ray Data warns of a limit above what there is to do
    )
    dataset = dataset.repartition(target_num_rows_per_block=plan.batch_size, strict=True)
    dataset = dataset.map_batches(
        _decode_task,
        fn_kwargs={
            "decoder": plan.decoder,
            "augment": plan.augment,
            "seed": plan.seed,
            "emitter": plan.emitter,
            "split": plan.split,
            "substitute": not plan.logits_only,
            "logits": plan.logits,
        },
        batch_size=None,
        batch_format="pyarrow",
        zero_copy_batch=True,
        concurrency=None if plan.max_decode_tasks is None else min(plan.max_decode_tasks, num_blocks),
    )
    if plan.pool is not None:
        pool = plan.pool
        with allow_actor_options():
            dataset = dataset.map_batches(
                TeacherActor,
                fn_constructor_args=(
                    pool.build,
                    plan.emitter,
                    pool.num_threads,
                    plan.logits_only,
                    pool.fingerprint,
                    pool.fill,
                ),
                batch_size=plan.batch_size,  # a block; Ray Data asks actors with GPUs for a number
                batch_format="numpy",
                zero_copy_batch=True,
                compute=ActorPoolStrategy(min_size=pool.min_size, max_size=pool.max_size),
                **pool.actor_options,
            )
    return dataset


def configure_context(context: DataContext, plan: StreamPlan) -> None:
    """Sets what the order and the safety of the stream depend on."""
    # Ray Data cuts blocks of 1.5 times this size, which would mix their rows.
    context.target_max_block_size = max(2 * plan.block_bytes + 1, 128 * 2**20)
    context.max_errored_blocks = 0  # anything else loses batches without a word
    # What Ray Data would wrap around an error loses it on the way to another process, and its sentence with it.
    context.raise_original_map_exception = True
    context.execution_no_progress_timeout_s = plan.no_progress_timeout_s
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options = execution_options(plan)


def execution_options(plan: StreamPlan) -> ExecutionOptions:
    """Order is kept; the object store's share is capped where the plan says so."""
    limits = ExecutionResources.for_limits(object_store_memory=plan.object_store_bytes)
    return ExecutionOptions(preserve_order=True, resource_limits=limits, verbose_progress=False)


def segments(size: int, first: int, stop: int) -> list[tuple[int, int]]:
    """The chain of segments of ``size`` blocks that covers ``first`` to ``stop``; at least one, which may be empty."""
    return [(begin, min(begin + size, stop)) for begin in range(first, stop, size)] or [(first, first)]


def iterate_stream(shards: Iterable[ray.data.DataIterator], with_teacher: bool) -> Iterator[dict[str, Any]]:
    """Blocks of consecutive segments as keyword arguments of ``pipeline.training.Block``.

    The arrays are views of the object store, so nothing is copied here.
    """
    for shard in shards:
        for batch in shard.iter_batches(
            batch_size=None,  # type: ignore[arg-type]
            batch_format="numpy",
            prefetch_batches=2,
        ):
            positions = np.unique(batch[BLOCK])
            yield {
                # A block mixed from several has no position of its own; the check downstream says so.
                "position": int(positions[0]) if len(positions) == 1 else -1,
                "inputs": batch[INPUT],
                "labels": batch[LABEL],
                "sample_ids": batch[SAMPLE_ID],
                "teacher_logits": batch[TEACHER_LOGITS] if with_teacher else None,
                "partner_labels": batch.get(PARTNER_LABEL),
                "label_weights": batch.get(LABEL_WEIGHT),
            }


class Phase(NamedTuple):
    """A stretch of the run that has streams of one kind.

    Attributes:
        blocks_per_segment: of its streams.
        stop: block after its last one.
        demands: what the cluster must have for its streams to go on.
    """

    blocks_per_segment: int
    stop: int
    demands: tuple[Demand, ...] = ()


class Segment(NamedTuple):
    """Blocks ``first`` to ``stop`` of the run, which one stream delivers, and the number of their phase."""

    phase: int
    first: int
    stop: int


def list_segments(phases: Sequence[Phase], cursor: int) -> list[Segment]:
    """The chain of segments from the cursor to the end of the last phase; none where nothing is left."""
    found = []
    for number, phase in enumerate(phases):
        if cursor < phase.stop:
            found += [Segment(number, *ends) for ends in segments(phase.blocks_per_segment, cursor, phase.stop)]
            cursor = phase.stop
    return found


@dataclass(frozen=True)
class RunStream:
    """The streams of a run, one phase after the other.

    Attributes:
        plans: the stream of each phase.
        stops: block after the last one of each phase; the last is the end of the run.
        between: called by one process before the first block of the second phase is asked for.
    """

    plans: tuple[StreamPlan, ...]
    stops: tuple[int, ...]
    between: Callable[[], None] | None = None

    @property
    def phases(self) -> tuple[Phase, ...]:
        pairs = zip(self.plans, self.stops, strict=True)
        return tuple(Phase(plan.blocks_per_segment, stop, plan.demands) for plan, stop in pairs)


def chain_streams(
    stream: RunStream, read_cursor: Callable[[], int], first: int
) -> dict[str, Dataset | Callable[[], Dataset]]:
    """Dataset builders for Ray Train, one a segment, named in their order.

    Ray calls each without arguments whenever the workers (re)start; ``read_cursor`` then tells where
    the last committed checkpoint stands, so a later start has fewer or shorter segments.

    Args:
        first: the cursor now; it only fixes how many segments there can be.
    """

    def build(index: int) -> Dataset:
        chain, end = list_segments(stream.phases, read_cursor()), stream.stops[-1]
        phase, begin, stop = chain[index] if index < len(chain) else Segment(len(stream.plans) - 1, end, end)
        return build_stream(stream.plans[phase], begin, stop)

    count = max(len(list_segments(stream.phases, first)), 1)
    return {segment_name(index): partial(build, index) for index in range(count)}


def segment_name(index: int) -> str:
    """What Ray Train calls a segment's dataset."""
    return f"train-{index:04d}"


def whole_split(plan: StreamPlan) -> StreamPlan:
    """The same stream over a split in the order of its ids, without augmentation, for logits alone.

    A row that is skipped keeps its place, with sample id NO_SAMPLE; its logits mean nothing.
    """
    return replace(plan, augment=AugmentParams(), logits_only=True)
