"""One function call somewhere on the cluster."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import ray
from ray.exceptions import RayTaskError

from pipeline.contracts.events import Emitter
from pipeline.data.waiting import tell_waits
from pipeline.errors import PipelineError

A = TypeVar("A")
R = TypeVar("R")


def run_task(function: Callable[[A], R], argument: A, bundle: dict[str, float], emitter: Emitter | None = None) -> R:
    """Calls ``function(argument)`` in a task that holds ``bundle``; its own errors come back as they are.

    Args:
        emitter: is told of the storage services that the task waits for.
    """
    custom = {name: amount for name, amount in bundle.items() if name not in ("CPU", "GPU")}
    task: Any = ray.remote(num_cpus=bundle.get("CPU", 0), num_gpus=bundle.get("GPU", 0), resources=custom)(_call)
    try:
        result: R = ray.get(task.remote(function, argument, emitter))
    except RayTaskError as error:
        raise find_pipeline_error(error) or error from None
    return result


def _call(function: Callable[[A], R], argument: A, emitter: Emitter | None) -> R:
    tell_waits(emitter)
    return function(argument)


def find_pipeline_error(error: BaseException | None) -> PipelineError | None:
    """Our own error inside what Ray wrapped around it."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        # Ray's wrapper is also an instance of the class it wraps, by another name.
        if isinstance(error, PipelineError) and not isinstance(error, RayTaskError):
            return error
        for failure in getattr(error, "worker_failures", {}).values():
            if (found := find_pipeline_error(failure)) is not None:
                return found
        inner = getattr(error, "cause", None) or getattr(error, "controller_failure", None)
        error = inner if isinstance(inner, BaseException) else (error.__cause__ or error.__context__)
    return None
