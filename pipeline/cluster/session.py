"""Joining a Ray cluster, or starting one on this machine that is large enough for the run."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.cluster.preflight import Demand, total_demand
from pipeline.errors import ResourceError

# What Ray, Data and Train write through Python's logging.
_LOGGERS = ("ray", "ray.data", "ray.train", "ray.tune", "ray.util", "ray._private")

# Read by Ray when it is imported or started: a checkpoint counts once the controller has polled it.
_ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # user code and relative paths keep meaning what they meant
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
}


def set_environment() -> None:
    """Sets what Ray reads when it starts, except where the user did."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)


@contextmanager
def ray_session(
    address: str | None, demands: list[Demand], object_store_bytes: int | None, log_file: Path
) -> Iterator[bool]:
    """Connects for the time of the block; yields whether this call started the cluster.

    Args:
        address: a cluster's address; ``"local"`` starts one; none takes RAY_ADDRESS, else a cluster
            that runs on this machine, else starts one.
        demands: what the run needs. A cluster started here declares as many logical CPUs as that
            (they are a count, not a promise of speed); a cluster found is never told anything.
        object_store_bytes: size of the object store of a cluster started here.
        log_file: takes Ray's own log lines.
    """
    set_environment()
    import ray

    if ray.is_initialized():  # a test or a notebook brought its own
        yield False
        return
    handler = _log_to(log_file)
    options: dict[str, Any] = {"logging_level": logging.WARNING, "log_to_driver": True, "configure_logging": False}
    joined = address != "local" and _connect(ray, address, options)
    if not joined:
        # Nobody takes this machine away on notice, and the watcher is one more process to start.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        cpus = max(math.ceil(total_demand(demands, at_most=True).get("CPU", 0.0)), os.cpu_count() or 1)
        ray.init(
            address="local",
            num_cpus=cpus,
            include_dashboard=False,
            object_store_memory=object_store_bytes,
            **options,
        )
    try:
        yield not joined
    finally:
        ray.shutdown()
        handler.close()


def _connect(ray: Any, address: str | None, options: dict[str, Any]) -> bool:
    """Joins the cluster at ``address``, or one that runs here; tells whether there was one."""
    try:
        ray.init(address=address or os.environ.get("RAY_ADDRESS") or "auto", **options)
    except ConnectionError as error:
        wanted = address or os.environ.get("RAY_ADDRESS")
        if wanted and wanted != "auto":
            raise ResourceError(
                f"no Ray cluster answers at {wanted!r} ({error}); start it, correct cluster.address or RAY_ADDRESS, "
                "or use cluster.address=local for one on this machine"
            ) from None
        return False
    return True


def _log_to(path: Path) -> logging.Handler:
    """Sends to ``path`` what Ray would put on the terminal: its logs here, and its processes' output."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    # Importing them configures their loggers, so that comes before ours.
    import ray._private.worker
    import ray.data
    import ray.train

    for name in _LOGGERS:
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.propagate = False

    def write_lines(data: dict[str, Any], ignore_prefix: bool = False) -> None:
        if data["pid"] == "autoscaler":  # a page of status every few seconds, also where nothing scales
            return
        who = data.get("actor_name") or data.get("task_name") or ""
        for line in data["lines"]:
            if "State API may be temporarily unavailable" in line:  # every second, on a cluster without dashboard
                continue
            record = logging.LogRecord("ray.process", logging.INFO, "", 0, f"{who}({data['pid']}) {line}", None, None)
            handler.handle(record)

    # Ray prints what its processes write past Python's logging; this function is where all of it passes.
    ray._private.worker.print_to_stdstream = write_lines
    return handler
