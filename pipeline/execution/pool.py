"""What a configuration asks of Ray for a stream: the pool of networks, the data tasks, their limits."""

from __future__ import annotations

import math
import pickle
from typing import TYPE_CHECKING, Any

from pipeline.config.schema import Config
from pipeline.contracts.columns import InputSpec
from pipeline.data import SplitReader
from pipeline.models import PoolParams
from pipeline.training import TeacherArguments

if TYPE_CHECKING:  # importing ray takes seconds, and not every way needs it
    from pipeline.cluster.preflight import Demand
    from pipeline.cluster.stream import PoolPlan

_DEFAULT_DATA_TASKS = 2


def pool_device(pool: PoolParams) -> str:
    """Where the pool's networks live. Ray does not hide GPUs from a process that holds none of them."""
    return "cuda" if pool.num_gpus else "cpu"


def make_pool_plan(pool: PoolParams, arguments: TeacherArguments, fingerprint: str) -> PoolPlan:
    """The pool that ``teacher.pool`` describes, for the network that ``arguments`` build."""
    from pipeline.cluster.stream import PoolPlan

    options = {
        "num_cpus": pool.num_cpus,
        "num_gpus": pool.num_gpus,
        "resources": dict(pool.resources),
        "max_restarts": -1,
        "max_task_retries": pool.max_task_retries,
        **({"accelerator_type": pool.accelerator_type} if pool.accelerator_type else {}),
        **({"label_selector": dict(pool.label_selector)} if pool.label_selector else {}),
    }
    return PoolPlan(
        build=pickle.dumps(arguments),
        min_size=pool.min,
        max_size=pool.max or pool.min,
        actor_options=options,
        num_threads=max(1, int(pool.num_cpus)),
        fingerprint=fingerprint,
    )


def estimate_block_bytes(spec: InputSpec, batch_size: int, reader: SplitReader, *, with_partners: bool = False) -> int:
    """Size of a block: decoded with its logits, or as it is stored where that is larger (photographs, say).

    Args:
        spec: of decoded rows.
        batch_size: rows of a block.
        reader: of the rows.
        with_partners: whether each row is read with another that is mixed into it.
    """
    item_bytes = 1 if spec.kind == "image" else 4
    decoded = math.prod(spec.shape) * item_bytes + 4 * spec.num_classes + 48
    encoded = (reader.encoded_bytes / max(reader.num_rows, 1) + 48) * (2 if with_partners else 1)
    return batch_size * max(decoded, math.ceil(encoded))


def stream_limits(config: Config, actor: str | None) -> dict[str, Any]:
    """The fields of ``StreamPlan`` that say what of the cluster a stream needs and may take, and for how long.

    Args:
        actor: see ``list_stream_demands``.
    """
    return {
        "demands": tuple(list_stream_demands(config, actor)),
        "max_read_tasks": _num_data_tasks(config),
        "max_decode_tasks": None if config.cluster.data_cpus is None else _num_data_tasks(config),
        "object_store_bytes": config.cluster.object_store_bytes,
        "no_progress_timeout_s": config.teacher.pool.no_progress_timeout_s,
    }


def list_stream_demands(config: Config, actor: str | None) -> list[Demand]:
    """What the stream needs of the cluster.

    Args:
        actor: what an actor of the pool is called, for people; none: there is no pool.
    """
    from pipeline.cluster.preflight import Demand

    demands = []
    if actor is not None:
        pool = config.teacher.pool
        bundle = {"CPU": pool.num_cpus, "GPU": pool.num_gpus, **pool.resources}
        if pool.accelerator_type is not None:
            bundle[f"accelerator_type:{pool.accelerator_type}"] = 0.001  # how Ray counts what a node is of
        demands.append(Demand(actor, pool.min, bundle, "teacher.pool.min", most=pool.max))
    demands.append(Demand("data task", _num_data_tasks(config), {"CPU": 1.0}, "cluster.data_cpus"))
    return demands


def _num_data_tasks(config: Config) -> int:
    limit = config.cluster.data_cpus
    return _DEFAULT_DATA_TASKS if limit is None else max(1, int(limit))
