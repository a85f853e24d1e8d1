"""What `ray_internals` has of Ray is still there, and does what is relied upon; no other module has any."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import signal
import subprocess
import sys
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import ray.data

from pipeline.cluster import ray_internals
from pipeline.cluster.session import end_left_over
from tests.integration.conftest import NUM_CPUS
from tests.integration.test_preflight import wait_until

CLUSTER = Path(ray_internals.__file__).parent  # nothing else imports Ray, which the layers contract holds
PRIVATE = ("ray._private", "ray._raylet", "ray._internal", "._internal")
SETTINGS = (
    ray_internals.ENVIRONMENT
    | ray_internals.ENVIRONMENT_OF_OWN
    | ray_internals.ENVIRONMENT_OF_TRIALS
    | ray_internals.ENVIRONMENT_OF_TUNE
)
pytestmark = pytest.mark.usefixtures("ray_cluster")


def test_this_is_the_ray_that_was_tested() -> None:
    assert version("ray").startswith("2.60.")


# --- nobody else ----------------------------------------------------------------------------------------------------


def imported_names(path: Path) -> list[tuple[str, str]]:
    """Module and name of every import of Ray in a file; the name of a whole module is empty."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "ray":
            found += [(node.module or "", alias.name) for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names if alias.name.split(".")[0] == "ray"]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "ray":
            found.append(("ray", node.attr))
    return found


def is_public(module: str, name: str) -> bool:
    thing = importlib.import_module(module)
    if name:
        thing = getattr(thing, name, None) or importlib.import_module(f"{module}.{name}")
    marked = getattr(thing, "_annotated_type", None)
    return not any(part in f"{module}.{name}" for part in PRIVATE) and (marked is None or marked.value == "PublicAPI")


@pytest.mark.parametrize("path", sorted(CLUSTER.glob("*.py")), ids=lambda path: path.name)
def test_all_else_uses_public_names(path: Path) -> None:
    if path.name != "ray_internals.py":
        assert [name for name in imported_names(path) if not is_public(*name)] == []


def test_every_name_is_there() -> None:
    assert [name for name in ray_internals.__all__ if getattr(ray_internals, name, None) is None] == []
    with pytest.raises(AttributeError, match="no attribute 'Searchers'"):
        ray_internals.Searchers  # noqa: B018


# --- settings -------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def sources_of_ray() -> bytes:
    """Python and the compiled core, which holds the names of its settings."""
    folder = Path(ray.__file__).parent
    files = [
        path
        for part in ("_private", "air", "dashboard", "data", "train", "tune", "util")
        for path in (folder / part).rglob("*.py")
    ]
    return b"".join(path.read_bytes() for path in [*files, folder / "_raylet.so"])


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_setting_is_read_by_ray(name: str) -> None:
    # What begins in capitals and goes on in small letters is a setting of the core, which adds the prefix itself.
    own = name.removeprefix("RAY_")
    assert (own if own.islower() else name).encode() in sources_of_ray()


def test_what_the_user_has_set_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AIR_NEW_OUTPUT", "1")
    monkeypatch.delenv("TUNE_WARN_THRESHOLD_S", raising=False)
    ray_internals.set_defaults({"RAY_AIR_NEW_OUTPUT": "0", "TUNE_WARN_THRESHOLD_S": "10"})
    assert (os.environ["RAY_AIR_NEW_OUTPUT"], os.environ.pop("TUNE_WARN_THRESHOLD_S")) == ("1", "10")


# --- the cluster ----------------------------------------------------------------------------------------------------


def test_cluster_counts_what_it_has() -> None:
    (node,) = ray_internals.nodes()
    assert node["Alive"]
    assert node["Resources"]["CPU"] == ray_internals.cluster_resources()["CPU"] == NUM_CPUS
    assert node["NodeManagerAddress"] == ray_internals.get_node_ip_address()

    @ray.remote(num_cpus=3)
    class Holder:
        def there(self) -> bool:
            return True

    holder: Any = Holder.remote()
    assert ray.get(holder.there.remote())
    wait_until(lambda: ray_internals.available_resources()["CPU"] <= NUM_CPUS - 3)
    ray.kill(holder)


def test_declared_resources_are_the_autoscalers(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray._private.state import GlobalState
    from ray.core.generated import autoscaler_pb2

    assert ray_internals.declared_resources() == {}
    group = autoscaler_pb2.NodeGroupConfig(resources={"CPU": 8, "GPU": 2}, max_count=3)
    config = autoscaler_pb2.ClusterConfig(node_group_configs=[group])
    monkeypatch.setattr(GlobalState, "get_cluster_config", lambda self: config)
    assert ray_internals.declared_resources() == {"CPU": 24.0, "GPU": 6.0}


# --- data -----------------------------------------------------------------------------------------------------------


def test_context_has_what_the_stream_sets() -> None:
    context = ray_internals.DataContext.get_current().copy()
    for name in (
        "target_max_block_size", "max_errored_blocks", "raise_original_map_exception",
        "execution_no_progress_timeout_s", "enable_progress_bars", "print_on_execution_start", "execution_options",
    ):  # fmt: skip
        assert hasattr(context, name), name
    limits = ray_internals.ExecutionResources.for_limits(object_store_memory=5)
    options = ray_internals.ExecutionOptions(preserve_order=True, resource_limits=limits, verbose_progress=False)
    assert (options.preserve_order, options.resource_limits.object_store_memory) == (True, 5)


def test_read_task_yields_what_its_function_does() -> None:
    metadata = ray_internals.BlockMetadata(num_rows=2, size_bytes=16, input_files=None, exec_stats=None)
    blocks = ["one", "two"]
    assert list(ray_internals.ReadTask(lambda: blocks, metadata)()) == blocks


class Deadly:
    """Ends its process at every block, having written down that it was asked."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        (self._folder / str(os.getpid())).touch()
        os.kill(os.getpid(), signal.SIGKILL)
        return batch


def test_block_that_kills_its_actor_is_not_tried_for_ever(tmp_path: Path) -> None:
    with ray_internals.allow_actor_options():
        dataset = ray.data.range(1).map_batches(
            Deadly,
            fn_constructor_args=(str(tmp_path),),
            compute=ray.data.ActorPoolStrategy(size=1),
            max_restarts=-1,
            max_task_retries=1,
        )
    with pytest.raises(ray.exceptions.RayError):
        dataset.materialize()
    assert len(list(tmp_path.iterdir())) == 2


# --- tune -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "methods"),
    [
        ("Searcher", ["suggest", "on_trial_result", "on_trial_complete", "save", "restore"]),
        ("OptunaSearch", ["suggest", "on_trial_complete"]),
        ("TrialScheduler", ["on_trial_add", "on_trial_result"]),
    ],
)
def test_classes_of_tune_have_the_methods(name: str, methods: list[str]) -> None:
    found = getattr(ray_internals, name)
    assert [method for method in methods if not callable(getattr(found, method, None))] == []
    if name == "OptunaSearch":
        assert {"points_to_evaluate", "sampler", "storage", "study_name"} <= set(inspect.signature(found).parameters)
    elif name == "Searcher":
        assert found.FINISHED


# --- processes ------------------------------------------------------------------------------------------------------


def test_what_processes_print_goes_to_the_log(ray_cluster: Path) -> None:
    @ray.remote(num_cpus=0)
    def speak() -> int:
        print("said by a task")
        return os.getpid()

    line = f"speak({ray.get(speak.remote())}) said by a task"
    wait_until(lambda: line in ray_cluster.read_text())


def test_processes_of_a_ray_started_here_are_known() -> None:
    @ray.remote(num_cpus=0)
    def whoami() -> int:
        return os.getpid()

    found = {process.pid: process.name() for process in ray_internals.list_own_processes()}
    assert {"raylet", "gcs_server"} <= set(found.values())
    assert ray.get(whoami.remote()) in found
    assert os.getpid() not in found


def test_process_that_does_not_end_by_itself_is_killed() -> None:
    endless = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
    short = subprocess.Popen([sys.executable, "-c", ""])
    processes = [psutil.Process(child.pid) for child in (endless, short)]
    short.wait()
    (who,) = end_left_over(processes, patience_s=0.1)
    assert f"process {endless.pid}" in who
    assert endless.wait() == -signal.SIGKILL
