"""The change from writing a cache to reading it, in the middle of a run."""

from __future__ import annotations

import pickle
import time
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayTaskError

from pipeline.cluster.tasks import find_pipeline_error
from pipeline.contracts.events import Emitter, Event
from pipeline.data import SplitReader
from pipeline.data.sealing import SealPlan, seal_fill
from pipeline.data.waiting import tell_waits

_POOL_OPTIONS = ("num_cpus", "num_gpus", "resources", "accelerator_type", "label_selector")


@dataclass(frozen=True)
class SealTask:
    """Seals a cache in a task that holds what an actor of the pool held, for the rows that were in no block.

    Attributes:
        plan: what is sealed.
        reader: reference to the reader of the training split.
        build: pickled arguments of ``Teacher``.
        actor_options: of the pool.
        emitter: is told.
    """

    plan: SealPlan
    reader: ray.ObjectRef[Any]
    build: bytes
    actor_options: dict[str, Any]
    emitter: Emitter

    def __call__(self) -> None:
        """Returns once there is a cache; the pool's stream has ended by then, or does so while this waits."""
        options = {name: value for name, value in self.actor_options.items() if name in _POOL_OPTIONS}
        started = time.time()
        self.emitter.emit(Event("stage", {"name": "cache", "state": "started", "detail": "sealing what was filled"}))
        try:
            counted = ray.get(ray.remote(max_retries=1)(_seal).options(**options).remote({"task": self}))
        except RayTaskError as error:
            raise find_pipeline_error(error) or error from None
        detail = f"{counted} rows were in no block and were computed; {time.time() - started:.0f} s"
        self.emitter.emit(Event("stage", {"name": "cache", "state": "finished", "detail": detail}))


def _seal(wrapped: dict[str, Any]) -> int:
    from pipeline.models import Teacher

    task: SealTask = wrapped["task"]
    tell_waits(task.emitter)
    reader: SplitReader = ray.get(task.reader)
    return seal_fill(task.plan, reader, lambda: Teacher(**pickle.loads(task.build)))
