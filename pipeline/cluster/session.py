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

# Read by Ray when it is imported or started; what the user has set stands.
_ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # a checkpoint counts once the controller has polled it
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # user code and relative paths keep meaning what they meant
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
}
_ENVIRONMENT_OF_OWN = {
    # Nobody takes this machine away on notice, and the watcher is one more process to start.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    # Without a dashboard nobody reads the figures of every process, which cost CPU time to collect, nor the
    # record of every task, by which Ray's control store grew 5 to 11 kB a block.
    "REPORTER_UPDATE_INTERVAL_MS": "60000",
    "RAY_enable_metrics_collection": "0",
    "RAY_task_events_report_interval_ms": "0",
}
_OPTIONS: dict[str, Any] = {"logging_level": logging.WARNING, "log_to_driver": True, "configure_logging": False}


@contextmanager
def ray_session(address: str | None, demands: list[Demand], log_file: Path) -> Iterator[bool]:
    """Connects for the time of the block; yields whether this call started the cluster.

    Args:
        address: a cluster's address; ``"local"`` starts one; none takes RAY_ADDRESS, else a cluster
            that runs on this machine, else starts one.
        demands: what the run needs. A cluster started here declares as many logical CPUs as that
            (they are a count, not a promise of speed); a cluster found is never told anything.
        log_file: takes Ray's own log lines.
    """
    _set_defaults(_ENVIRONMENT)
    import ray

    if ray.is_initialized():  # a test or a notebook brought its own
        yield False
        return
    if address != "local":
        with _log_to(log_file):
            if _connect(ray, address):
                try:
                    yield False
                finally:
                    ray.shutdown()
                return
    num_cpus = max(math.ceil(total_demand(demands, at_most=True).get("CPU", 0.0)), os.cpu_count() or 1)
    with own_ray(num_cpus, log_file):
        yield True


def is_joined() -> bool:
    """Whether this process is connected to a Ray."""
    import ray

    return bool(ray.is_initialized())


@contextmanager
def own_ray(num_cpus: int, log_file: Path, resources: dict[str, float] | None = None) -> Iterator[None]:
    """A Ray on this machine, without a dashboard, for the time of the block.

    Args:
        resources: custom ones, such as accelerators that are only simulated.
    """
    _set_defaults(_ENVIRONMENT | _ENVIRONMENT_OF_OWN)
    import ray

    with _log_to(log_file):
        ray.init(address="local", num_cpus=num_cpus, resources=resources, include_dashboard=False, **_OPTIONS)
        try:
            yield
        finally:
            ray.shutdown()


def _set_defaults(environment: dict[str, str]) -> None:
    for name, value in environment.items():
        os.environ.setdefault(name, value)


def _connect(ray: Any, address: str | None) -> bool:
    """Joins the cluster at ``address``, or one that runs here; tells whether there was one."""
    try:
        ray.init(address=address or os.environ.get("RAY_ADDRESS") or "auto", **_OPTIONS)
    except ConnectionError as error:
        wanted = address or os.environ.get("RAY_ADDRESS")
        if wanted and wanted != "auto":
            raise ResourceError(
                f"no Ray cluster answers at {wanted!r} ({error}); start it, correct cluster.address or RAY_ADDRESS, "
                "or use cluster.address=local for one on this machine"
            ) from None
        return False
    return True


@contextmanager
def _log_to(path: Path) -> Iterator[None]:
    """Sends to ``path`` what Ray would put on the terminal: its logs here, and its processes' output."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path)
    # Python would print a traceback for each line that a full disk does not take, and bury what the run has to say.
    handler.handleError = lambda record: None  # type: ignore[method-assign]
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    # Importing them configures their loggers, so that comes before ours.
    import ray._private.worker as ray_worker
    import ray.data  # noqa: F401

    def write_lines(data: dict[str, Any], ignore_prefix: bool = False) -> None:
        if data["pid"] == "autoscaler":  # a page of status every few seconds, also where nothing scales
            return
        who = data.get("actor_name") or data.get("task_name") or ""
        for line in data["lines"]:
            if "State API may be temporarily unavailable" in line:  # every second, on a cluster without dashboard
                continue
            record = logging.LogRecord("ray.process", logging.INFO, "", 0, f"{who}({data['pid']}) {line}", None, None)
            handler.handle(record)

    loggers = [logging.getLogger(name) for name in _LOGGERS]
    before = [(logger, logger.handlers, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.handlers, logger.propagate = [handler], False
    # Ray prints what its processes write past Python's logging; this function is where all of it passes.
    printed_by, ray_worker.print_to_stdstream = ray_worker.print_to_stdstream, write_lines
    try:
        yield
    finally:
        ray_worker.print_to_stdstream = printed_by
        for logger, handlers, propagate in before:
            logger.handlers, logger.propagate = handlers, propagate
        handler.close()
