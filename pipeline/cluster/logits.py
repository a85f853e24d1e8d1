"""A network's logits on a whole split, by the same pool: into a file, or block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import ray
from ray.exceptions import RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.cluster.pool import ROWS_FORWARDED
from pipeline.cluster.stall import StallGuard
from pipeline.cluster.stream import StreamPlan, build_stream, segments
from pipeline.cluster.tasks import find_pipeline_error
from pipeline.contracts.columns import BLOCK, SAMPLE_ID, TEACHER_LOGITS
from pipeline.contracts.events import RowEvents
from pipeline.contracts.read_ahead import read_ahead
from pipeline.data.bad_rows import NO_SAMPLE
from pipeline.data.cache import PartAssembler, PartBlocks, PartWriter
from pipeline.data.logits import save_logits
from pipeline.data.waiting import tell_waits
from pipeline.errors import StreamError


class BlockLogits(NamedTuple):
    """A network's logits of a block.

    Attributes:
        sample_ids: (B,) int64; NO_SAMPLE for rows that could not be decoded.
        logits: (B, num_classes) float32.
        rows_forwarded: rows that the network's forward call counted for it.
    """

    sample_ids: np.ndarray
    logits: np.ndarray
    rows_forwarded: int


def write_pool_logits(plan: StreamPlan, num_rows: int, path: Path) -> None:
    """Runs the pool over the split that ``plan`` reads and writes (rows, num_classes) float32 logits.

    The result is gathered by a task of its own, so that nothing of it passes through the driver; it
    runs on the driver's node, where ``path`` is.
    """
    _run_here(_gather, {"plan": plan}, num_rows, str(path))


def write_pool_parts(plan: StreamPlan, blocks: PartBlocks, writer: PartWriter) -> int:
    """Runs the pool over the rows of parts of a cache and writes each part as soon as it is whole.

    Args:
        plan: of ``CacheBlocks``; its emitter is told how far it is.

    Returns:
        Rows that the teacher's forward call counted, those included that fill up the last block of each view.
    """
    counted: int = _run_here(_write_parts, {"plan": replace(plan, logits_only=True)}, blocks, writer)
    return counted


def _run_here(function: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a task on this node, which has the files; what it runs on Ray stays out of the driver's hands."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    task = ray.remote(num_cpus=0, max_retries=1)(function).options(scheduling_strategy=here)
    try:
        return ray.get(task.remote(*arguments))
    except RayTaskError as error:
        raise find_pipeline_error(error) or error from None


def iterate_pool_logits(plan: StreamPlan, num_blocks: int) -> Iterator[BlockLogits]:
    """Runs the pool over the blocks that ``plan`` reads, in this process.

    Args:
        plan: ``logits_only``, see ``whole_split``.
        num_blocks: in all.

    Yields:
        The logits of each block, in their order.

    Raises:
        PipelineError: whatever a task or an actor met.
        StreamError: a block came in another's place.
    """
    due = 0
    try:
        for first, stop in segments(plan.blocks_per_segment, 0, num_blocks):
            batches = build_stream(plan, first, stop).iter_batches(batch_size=None, batch_format="numpy")
            for batch in read_ahead(iter(batches), StallGuard(plan.emitter, plan.demands)):
                positions = np.unique(batch[BLOCK])
                if positions.tolist() != [due]:
                    raise StreamError(
                        f"the stream delivered rows of blocks {positions.tolist()} where block {due} was due; nothing "
                        "was kept, run the command again"
                    )
                due += 1
                forwarded = int(batch[ROWS_FORWARDED][0])
                yield BlockLogits(np.array(batch[SAMPLE_ID]), np.array(batch[TEACHER_LOGITS]), forwarded)
    except Exception as error:
        raise find_pipeline_error(error) or error from None


def _gather(wrapped: dict[str, Any], num_rows: int, path: str) -> None:
    plan: StreamPlan = wrapped["plan"]
    blocks = iterate_pool_logits(plan, -(-num_rows // plan.batch_size))
    # Those of a row that could not be decoded mean nothing.
    parts = [np.where(block.sample_ids[:, None] == NO_SAMPLE, np.nan, block.logits) for block in blocks]
    save_logits(Path(path), np.concatenate(parts))


def _write_parts(wrapped: dict[str, Any], blocks: PartBlocks, writer: PartWriter) -> int:
    plan: StreamPlan = wrapped["plan"]
    tell_waits(plan.emitter)
    assembler, progress = PartAssembler(blocks, writer), RowEvents(plan.emitter, blocks.num_rows)
    forwarded = 0
    for block in iterate_pool_logits(plan, blocks.num_blocks):
        progress.advance(assembler.add(block.sample_ids, block.logits))
        forwarded += block.rows_forwarded
    return forwarded
