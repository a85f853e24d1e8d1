"""One function call somewhere on the cluster."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import ray
from ray.exceptions import RayTaskError

from pipeline.errors import PipelineError

A = TypeVar("A")
R = TypeVar("R")


def run_task(function: Callable[[A], R], argument: A, bundle: dict[str, float]) -> R:
    """Calls ``function(argument)`` in a task that holds ``bundle``; its own errors come back as they are."""
    custom = {name: amount for name, amount in bundle.items() if name not in ("CPU", "GPU")}
    task: Any = ray.remote(num_cpus=bundle.get("CPU", 0), num_gpus=bundle.get("GPU", 0), resources=custom)(function)
    try:
        result: R = ray.get(task.remote(argument))
    except RayTaskError as error:
        if isinstance(error.cause, PipelineError):
            raise error.cause from None
        raise
    return result
