"""``doctor``: is everything here that a run needs? One line each: ok, or what to do."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

from pipeline.config.load import load_config
from pipeline.config.request import Request
from pipeline.config.schema import Config
from pipeline.errors import PipelineError, RunError
from pipeline.report.tables import render_table

_PACKAGES = ("torch", "ray", "mlflow", "pyarrow")


def doctor(request: Request) -> int:
    """Prints what it found; returns 0, or 1 if something is to be repaired."""
    # A teacher is not needed to look at a machine.
    config = load_config(Request("train-teacher", request.overrides, request.conf_dirs), ("loss=cross_entropy",)).config
    rows = [_examine(name, check, config) for name, check in _CHECKS]
    print(render_table("doctor", ("", "what", "found"), rows))
    failed = sum(row[0] != "ok" for row in rows)
    print("everything is in order" if not failed else f"{failed} to repair")
    return 1 if failed else 0


def _examine(name: str, check: Callable[[Config], str], config: Config) -> tuple[str, str, str]:
    try:
        return ("ok", name, check(config))
    except PipelineError as error:
        return ("repair", name, error.message)
    except Exception as error:
        return ("repair", name, f"{type(error).__name__}: {error}")


def _versions(config: Config) -> str:
    return ", ".join(f"{name} {metadata.version(name)}" for name in _PACKAGES)


def _storage(config: Config) -> str:
    folder = Path(config.run.dir).parent if config.run.dir else Path("runs")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            stat = os.statvfs(folder)
    except OSError as error:
        raise RunError(
            f"{folder.resolve()} cannot be written ({error.strerror}); give run.dir=... in a folder that can"
        ) from None
    return f"{folder.resolve()} is writable, {stat.f_bavail * stat.f_frsize / 2**30:.0f} GiB free"


def _data(config: Config) -> str:
    source = config.data.open()
    first = source.split("train")
    source.decode(first.read(first.sample_ids[:1]))
    counts = ", ".join(f"{source.split(name).num_rows} {name}" for name in ("train", "validation"))
    spec = source.spec
    return f"{config.data.name}: {counts}; {spec.kind} {tuple(spec.shape)}, {spec.num_classes} classes"


def _tracking(config: Config) -> str:
    from pipeline.tracking.address import check_reachable, check_uri, strip_credentials

    uri = config.tracking.uri or f"sqlite:///{Path('runs').resolve() / 'mlflow.db'}"
    check_uri(uri)
    check_reachable(uri, config.tracking.experiment)
    return f"{strip_credentials(uri)} can be used"


def _accelerators(config: Config) -> str:
    import torch

    if not torch.cuda.is_available():
        return f"no GPU on this machine; {os.cpu_count()} CPU cores, {torch.get_num_threads()} torch threads"
    return ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))


def _cluster(config: Config) -> str:
    from pipeline.cluster.preflight import check_demand, cluster_capacity, show_resources
    from pipeline.cluster.session import ray_session
    from pipeline.execution.ways import list_demands

    if config.cluster.name == "inprocess":
        return "not used: cluster=inprocess"
    demands = list_demands(config, "train-teacher")
    with (
        tempfile.TemporaryDirectory() as scratch,
        ray_session(config.cluster.address, demands, Path(scratch) / "ray.log") as started,
    ):
        check_demand(demands)
        # Ray counts bytes of memory and the names of nodes among the resources.
        capacity = {name: n for name, n in cluster_capacity().items() if "memory" not in name and ":" not in name}
        return f"{'can start one here' if started else 'joined one'} with {show_resources(capacity)}"


def _checks() -> Iterator[tuple[str, Callable[[Config], str]]]:
    yield "versions", _versions
    yield "accelerators", _accelerators
    yield "data readable", _data
    yield "storage writable", _storage
    yield "tracking server", _tracking
    yield "Ray cluster", _cluster


_CHECKS = tuple(_checks())
