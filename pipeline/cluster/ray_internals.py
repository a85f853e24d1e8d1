"""What this package uses of Ray that Ray does not promise to keep: private and developer-level names, and settings.

All of it is here, each with the reason; ``tests/integration/test_ray_internals.py`` shows that it is still there and
does what is relied upon. ``pyproject.toml`` holds Ray to the minor version for which that was seen.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import psutil

# The cluster's own count of what it has: there is no other way to ask before something is placed.
from ray import available_resources, cluster_resources, nodes

# The address at which this node's processes are reached by the others.
from ray.util import get_node_ip_address

if TYPE_CHECKING:
    from ray.data import DataContext, ExecutionOptions, ExecutionResources, ReadTask
    from ray.data.block import BlockMetadata
    from ray.tune.schedulers import TrialScheduler
    from ray.tune.search import Searcher
    from ray.tune.search.optuna import OptunaSearch

__all__ = [
    "ENVIRONMENT",
    "ENVIRONMENT_OF_OWN",
    "ENVIRONMENT_OF_TRIALS",
    "ENVIRONMENT_OF_TUNE",
    "LOGGERS",
    "BlockMetadata",
    "DataContext",
    "ExecutionOptions",
    "ExecutionResources",
    "OptunaSearch",
    "ReadTask",
    "Searcher",
    "TrialScheduler",
    "allow_actor_options",
    "available_resources",
    "cluster_resources",
    "declared_resources",
    "get_node_ip_address",
    "list_own_processes",
    "nodes",
    "output_passed_to",
    "set_defaults",
]

# Imported when they are asked for: Data and Tune read their settings, and take seconds, when they are.
_LATER = {
    # The stream's order and safety are set here, for which map_batches and the like have no parameters.
    "DataContext": "ray.data",
    "ExecutionOptions": "ray.data",
    "ExecutionResources": "ray.data",
    # A source of our own: rows in training order, a few blocks a task.
    "ReadTask": "ray.data",
    "BlockMetadata": "ray.data.block",
    # The board is Tune's searcher, and points are drawn by Optuna's with the conditions of our space.
    "Searcher": "ray.tune.search",
    "OptunaSearch": "ray.tune.search.optuna",
    # Schedulers see the curves of earlier starts again.
    "TrialScheduler": "ray.tune.schedulers",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LATER[name]), name)


# --- settings that are read from the environment; what the user has set stands --------------------------------------

# By Ray, when it is imported or started.
ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # a checkpoint counts once the controller has polled it
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # user code and relative paths keep meaning what they meant
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
}
# By a Ray that a command starts on this machine.
ENVIRONMENT_OF_OWN = {
    # Nobody takes this machine away on notice, and the watcher is one more process to start.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    # Without a dashboard nobody reads the figures of every process, which cost CPU time to collect, nor the
    # record of every task, by which Ray's control store grew 5 to 11 kB a block.
    "REPORTER_UPDATE_INTERVAL_MS": "60000",
    "RAY_enable_metrics_collection": "0",
    "RAY_task_events_report_interval_ms": "0",
}
# By Tune, when it starts.
ENVIRONMENT_OF_TUNE = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the trials keep a journal of their own
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000",  # the board is what a search is resumed from
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # not every trial is judged
    "TUNE_WARN_THRESHOLD_S": "10",
    "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
}
# By Tune in a process that is to serve the next trial: a busy machine takes longer than 2 s to leave one.
ENVIRONMENT_OF_TRIALS = {"TUNE_FUNCTION_THREAD_TIMEOUT_S": "10"}


def set_defaults(environment: Mapping[str, str]) -> None:
    """Sets what the user has not set."""
    for name, value in environment.items():
        os.environ.setdefault(name, value)


# What Ray, Data and Train write through Python's logging.
LOGGERS = ("ray", "ray.data", "ray.train", "ray.tune", "ray.util", "ray._private")


# --- what has no public name ----------------------------------------------------------------------------------------


def declared_resources() -> dict[str, float]:
    """The most that an autoscaler may grow the cluster to, by resource; empty where none is declared.

    ``ray.autoscaler`` can be told of a demand, but not asked how far it may go.
    """
    import ray._private.state

    declared = ray._private.state.state.get_max_resources_from_cluster_config()
    return {name: float(amount) for name, amount in (declared or {}).items()}


@contextmanager
def allow_actor_options() -> Iterator[None]:
    """For ``map_batches`` with options of its actors as keywords, which is deprecated.

    ``max_restarts`` and ``max_task_retries`` of a pool's actors have no named parameter, and Ray Data's own defaults
    retry for ever a block that kills its actor. Both ways to set them, ``ray_remote_args`` and
    ``ray_remote_args_fn``, go in Ray 2.64.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`ray_remote_args` is deprecated")
        yield


@contextmanager
def output_passed_to(write: Callable[[dict[str, Any]], None]) -> Iterator[None]:
    """Gives what Ray's processes print to ``write`` instead of to the terminal, if Ray is joined within the block.

    Ray prints it past Python's logging, by one function that it remembers when it is joined.

    Args:
        write: takes a batch with ``pid``, ``lines`` and, where there is one, ``actor_name`` or ``task_name``.
    """
    import ray._private.worker as ray_worker

    def print_to_stdstream(data: dict[str, Any], ignore_prefix: bool = False) -> None:
        write(data)

    before, ray_worker.print_to_stdstream = ray_worker.print_to_stdstream, print_to_stdstream
    try:
        yield
    finally:
        ray_worker.print_to_stdstream = before


def list_own_processes() -> list[psutil.Process]:
    """The processes of the Ray that this process started, on this machine: its servers, and what they started.

    Ray ends them when it is left, but a process that cannot end by itself outlives that.
    """
    import ray._private.worker as ray_worker

    node = ray_worker._global_node
    if node is None:
        return []
    found: dict[int, psutil.Process] = {}
    for infos in node.all_processes.values():
        for info in infos:
            try:
                server = psutil.Process(info.process.pid)
                found |= {process.pid: process for process in (server, *server.children(recursive=True))}
            except psutil.NoSuchProcess:
                continue
    return list(found.values())
