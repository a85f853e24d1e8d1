"""The teacher's logits on a whole split, by the same pool, into a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.cluster.stream import StreamPlan, build_stream
from pipeline.cluster.tasks import find_pipeline_error
from pipeline.contracts.columns import BLOCK, TEACHER_LOGITS
from pipeline.data.logits import save_logits


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


def _gather(wrapped: dict[str, Any], num_rows: int, path: str) -> None:
    plan: StreamPlan = wrapped["plan"]
    dataset = build_stream(plan, 0, -(-num_rows // plan.batch_size))
    parts: dict[int, np.ndarray] = {}
    for batch in dataset.iter_batches(batch_size=None, batch_format="numpy"):
        parts[int(batch[BLOCK][0])] = np.array(batch[TEACHER_LOGITS])
    save_logits(Path(path), np.concatenate([parts[index] for index in sorted(parts)]))
