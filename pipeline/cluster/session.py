"""Joining a Ray cluster, or starting one on this machine that is large enough for the run."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from pipeline.cluster.preflight import Demand, total_demand
from pipeline.cluster.ray_internals import (
    ENVIRONMENT,
    ENVIRONMENT_OF_OWN,
    LOGGERS,
    list_own_processes,
    output_passed_to,
    set_defaults,
)
from pipeline.errors import ResourceError

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
    set_defaults(ENVIRONMENT)
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
    set_defaults(ENVIRONMENT | ENVIRONMENT_OF_OWN)
    import ray

    with _log_to(log_file) as log:
        ray.init(address="local", num_cpus=num_cpus, resources=resources, include_dashboard=False, **_OPTIONS)
        try:
            yield
        finally:
            processes = list_own_processes()
            ray.shutdown()
            for name in end_left_over(processes):
                log(f"{name} did not end with Ray, and was killed")


def end_left_over(processes: Sequence[psutil.Process], patience_s: float = 5.0) -> list[str]:
    """Kills those of ``processes`` that have not ended by themselves in ``patience_s``; returns who they were.

    Ray 2.60 can deadlock in a process that exits, which nobody would ever end then.
    """
    deadline = time.monotonic() + patience_s
    while (left := [process for process in processes if _lives(process)]) and time.monotonic() < deadline:
        time.sleep(0.05)  # between two looks: they are not all children of this process
    killed = []
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            killed.append(f"{process.name()} (process {process.pid})")
            process.kill()
    return killed


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


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
def _log_to(path: Path) -> Iterator[Callable[[str], None]]:
    """Sends to ``path`` what Ray would put on the terminal: its logs here, and its processes' output.

    Yields:
        a function that adds a line.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path)
    # Python would print a traceback for each line that a full disk does not take, and bury what the run has to say.
    handler.handleError = lambda record: None  # type: ignore[method-assign]
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    import ray.data  # noqa: F401  importing it configures its loggers, so that comes before ours

    def write(line: str) -> None:
        handler.handle(logging.LogRecord("ray.process", logging.INFO, "", 0, line, None, None))

    def write_lines(data: dict[str, Any]) -> None:
        if data["pid"] == "autoscaler":  # a page of status every few seconds, also where nothing scales
            return
        who = data.get("actor_name") or data.get("task_name") or ""
        for line in data["lines"]:
            if "State API may be temporarily unavailable" in line:  # every second, on a cluster without dashboard
                continue
            write(f"{who}({data['pid']}) {line}")

    loggers = [logging.getLogger(name) for name in LOGGERS]
    before = [(logger, logger.handlers, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.handlers, logger.propagate = [handler], False
    try:
        with output_passed_to(write_lines):
            yield write
    finally:
        for logger, handlers, propagate in before:
            logger.handlers, logger.propagate = handlers, propagate
        handler.close()
