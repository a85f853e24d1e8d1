"""A network's logits on a whole split, by the same pool: into a file, or block by block."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.cluster.stream import StreamPlan, build_stream, segments
from pipeline.cluster.tasks import find_pipeline_error
from pipeline.contracts.columns import BLOCK, SAMPLE_ID, TEACHER_LOGITS
from pipeline.data.bad_rows import NO_SAMPLE
from pipeline.data.logits import save_logits
from pipeline.errors import StreamError


def write_pool_logits(plan: StreamPlan, num_rows: int, path: Path) -> None:
    """Runs the pool over the split that ``plan`` reads and writes (rows, num_classes) float32 logits.

    The result is gathered by a task of its own, so that nothing of it passes through the driver; it
    runs on the driver's node, where ``path`` is.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    gather = ray.remote(num_cpus=0, max_retries=1)(_gather).options(scheduling_strategy=here)
    try:
        ray.get(gather.remote({"plan": plan}, num_rows, str(path)))
    except RayTaskError as error:
        raise find_pipeline_error(error) or error from None


def iterate_pool_logits(plan: StreamPlan, num_rows: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Runs the pool over the split that ``plan`` reads, in this process.

    Args:
        plan: of a whole split, see ``whole_split``.
        num_rows: of the split.

    Yields:
        Sample ids (B,) int64 and logits (B, num_classes) float32 of each block, in their order.

    Raises:
        PipelineError: whatever a task or an actor met.
        StreamError: a block came in another's place.
    """
    due = 0
    try:
        for first, stop in segments(plan.blocks_per_segment, 0, -(-num_rows // plan.batch_size)):
            for batch in build_stream(plan, first, stop).iter_batches(batch_size=None, batch_format="numpy"):
                positions = np.unique(batch[BLOCK])
                if positions.tolist() != [due]:
                    raise StreamError(
                        f"the stream delivered rows of blocks {positions.tolist()} where block {due} was due; nothing "
                        "was kept, run the command again"
                    )
                due += 1
                yield np.array(batch[SAMPLE_ID]), np.array(batch[TEACHER_LOGITS])
    except Exception as error:
        raise find_pipeline_error(error) or error from None


def _gather(wrapped: dict[str, Any], num_rows: int, path: str) -> None:
    blocks = iterate_pool_logits(wrapped["plan"], num_rows)
    # Those of a row that could not be decoded mean nothing.
    save_logits(
        Path(path), np.concatenate([np.where(ids[:, None] == NO_SAMPLE, np.nan, logits) for ids, logits in blocks])
    )
