"""A run is its folder: made once, locked while in use, gone on with by giving the same configuration again."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shutil
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import IO, Any

import yaml

from pipeline.config.own_code import drop_code, keep_code, kept_code
from pipeline.config.provenance import collect_provenance
from pipeline.config.results import read_run_id, write_json, write_result
from pipeline.config.schema import Config
from pipeline.config.stored import (
    EXTENDABLE,
    FORMAT_VERSION,
    RunStatus,
    StoredRun,
    hash_config,
    list_differences,
    never_began,
    read_json,
    read_run,
    write_text,
)
from pipeline.config.validate import build_config
from pipeline.contracts.locks import LOCK, Holding, LockedError, hold_lock
from pipeline.contracts.own_code import CODE_FOLDER, Code
from pipeline.errors import RunError

_PATHS = (
    ("data", "path"),
    ("cache", "path"),
    ("teacher", "checkpoint"),
    ("student", "checkpoint"),
    ("teacher", "code"),
    ("student", "code"),
)
# A folder with nothing else in it was left by a start that died before run.json was there.
_BEFORE_RUN_JSON = frozenset({LOCK, "config.yaml", "status.json", "provenance.json", CODE_FOLDER})


class Run(Holding):
    """A run folder that this process holds; see ``open_run``.

    Attributes:
        dir: absolute path of the folder.
        name: as shown in the tracker.
        command: the subcommand it belongs to.
        config: resolved: paths absolute, ``train.blocks_per_step`` a number.
        config_hash: 12 hexadecimal digits over what the run computes.
        resumed: whether the folder held an unfinished run of this configuration.
        finished: whether it holds a finished one; nothing is left to do.
    """

    def __init__(
        self, folder: Path, name: str, command: str, config: Config, lock: IO[str], *, resumed: bool, finished: bool
    ) -> None:
        super().__init__(lock)
        self.dir = folder
        self.name = name
        self.command = command
        self.config = config
        self.config_hash = hash_config(config)
        self.resumed = resumed
        self.finished = finished

    def discard(self) -> None:
        """Takes a run back that was made a moment ago and never began, so that a corrected one can have its folder."""
        if self.resumed or self.finished:
            return
        drop_code(self.dir)
        for name in ("run.json", *_BEFORE_RUN_JSON - {CODE_FOLDER}):
            (self.dir / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # something else is in it
            self.dir.rmdir()

    @property
    def resume_command(self) -> str:
        """What to type to go on with this run."""
        return f"python -m pipeline {self.command} resume={self.dir}"

    @property
    def result_path(self) -> Path:
        """``result.json``: what ``write_result`` wrote last."""
        return self.dir / "result.json"

    def read_status(self) -> RunStatus:
        """How far the run got."""
        status: RunStatus = read_json(self.dir / "status.json")["status"]
        return status

    def set_status(self, status: RunStatus, message: str = "") -> None:
        """Records how far the run got, and which process says so."""
        write_json(
            self.dir / "status.json",
            {"status": status, "message": message, "pid": os.getpid(), "host": platform.node(), "time": time.time()},
        )

    def read_provenance(self) -> dict[str, Any]:
        """What was recorded when the run began."""
        return read_json(self.dir / "provenance.json")

    def read_result(self) -> dict[str, Any]:
        """What ``write_result`` wrote last.

        Raises:
            RunError: no result yet.
        """
        return read_json(self.result_path)

    def write_result(
        self,
        status: RunStatus,
        metrics: Mapping[str, float],
        extra: Mapping[str, Any] | None = None,
        *,
        exit_code: int = 0,
        error: str | None = None,
    ) -> Path:
        """Writes ``result.json`` and the status.

        Args:
            metrics: by full name (``val/top1``); not-a-number and infinity become null.
            extra: further keys.
            exit_code: what the command ends with.
            error: the sentence of what went wrong.

        Returns:
            Path of ``result.json``.
        """
        values = {"exit_code": exit_code, **({"error": error} if error is not None else {}), **(extra or {})}
        write_result(self.result_path, self.dir, self.config_hash, status, metrics, values)
        self.set_status(status, error or "")
        self.finished = status == "finished"
        return self.result_path

    def refresh_result(self) -> None:
        """Puts the tracker's id of the run into ``result.json``, for a run that was finished without one."""
        write_json(self.result_path, self.read_result() | {"mlflow_run_id": read_run_id(self.dir)})


def open_run(
    command: str,
    config: Config,
    *,
    runs_root: Path = Path("runs"),
    provenance: Callable[[], Mapping[str, Any]] = dict,
    code: Callable[[], Mapping[str, Code]] = dict,
    extends: bool = False,
    wait_s: float = 0.0,
) -> Run:
    """Makes the folder of a run, or goes on with the one in ``run.dir``.

    Args:
        command: the subcommand.
        config: validated; paths may be relative to the working folder.
        runs_root: where a new folder is made if ``run.dir`` is not set.
        provenance: facts recorded with a new run (fingerprints of data and teacher); not called for an old one.
        code: the user's modules that the networks of a new run are built by, for each role (teacher, student); they are
            kept in the folder, and the configuration then names them there. Not called for an old run.
        extends: whether ``config`` may differ from the stored one in a total; see ``load_config``.
        wait_s: how long to wait for another process to leave the folder.

    Raises:
        RunError: another configuration or command made the folder, another process uses it, it cannot be
            written, or it would vanish with the Ray job.
        ConfigError: the stored ``train.blocks_per_step`` does not fit the number of workers.
    """
    name = config.run.name or default_run_name(config, command)
    named = Path(config.run.dir).expanduser() if config.run.dir else None
    refuse_vanishing("run.dir", named or runs_root)
    if config.cache.path is not None and "://" not in config.cache.path:
        refuse_vanishing("cache.path", Path(config.cache.path).expanduser())
    folder = _make_folder(named, runs_root, name)
    refuse_vanishing("run.dir", folder)
    lock = _lock(folder, wait_s)
    try:
        stored = _read_stored(folder)
        if stored is None:
            kept = keep_code(folder, code())
            resolved = _resolve(config, folder)
            _write_new(folder, name, command, resolved, lambda: {**provenance(), **kept})
            return Run(folder, name, command, resolved, lock, resumed=False, finished=False)
        resolved = _resolve(_adopt(config, stored), folder)
        changed = _compare(stored, command, resolved, extends)
        if changed:
            _write_config(folder, stored.name, command, resolved, read_json(folder / "run.json")["created"])
        finished = stored.status == "finished" and not changed
        if stored.status == "finished" and changed:
            write_json(folder / "status.json", read_json(folder / "status.json") | {"status": "new"})
        return Run(folder, stored.name, command, resolved, lock, resumed=not finished, finished=finished)
    except BaseException:
        if not (folder / "run.json").exists():  # made or locked a moment ago, and no run yet
            drop_code(folder)
            (folder / LOCK).unlink(missing_ok=True)
            if named is None:
                shutil.rmtree(folder, ignore_errors=True)
            with contextlib.suppress(OSError):  # it is gone, or something else is in it
                folder.rmdir()
        lock.close()
        raise


def default_run_name(config: Config, command: str = "distill") -> str:
    """``digits/small_cnn<-resnet20/kd/s0``, without the teacher where none is used."""
    if command == "select-perturbation":
        return f"{config.data.name}/{_network(config.teacher)}/perturbation-{config.selection.scope}/s{config.run.seed}"
    if command == "cache build":
        return f"{config.data.name}/{_network(config.teacher)}/cache-{config.cache.format}/s{config.view_seed}"
    if command == "search":
        taught = f"{_network(config.student)}<-{_network(config.teacher)}"
        return f"{config.data.name}/{taught}/search/s{config.run.seed}"
    if command == "train-teacher":
        network = f"teacher-{_network(config.teacher)}"
    elif config.loss.needs_teacher:
        network = f"{_network(config.student)}<-{_network(config.teacher)}"
    else:
        network = _network(config.student)
    return f"{config.data.name}/{network}/{config.loss.name}/s{config.run.seed}"


def _network(params: Any) -> str:
    """A zoo's entry says more than the zoo."""
    return str(getattr(params, "arch", params.name))


# --- opening ------------------------------------------------------------------------------------------------------


def _make_folder(named: Path | None, runs_root: Path, name: str) -> Path:
    try:
        if named is not None:
            named.mkdir(parents=True, exist_ok=True)
            return named.resolve()
        slug = re.sub(r"[^A-Za-z0-9._]+", "-", name).strip("-.") or "run"
        base = f"{datetime.now().astimezone():%Y%m%d-%H%M%S}-{slug[:100]}"
        runs_root.mkdir(parents=True, exist_ok=True)
        for number in range(1, 1000):
            folder = runs_root / (base if number == 1 else f"{base}-{number}")
            try:
                folder.mkdir()
            except FileExistsError:  # another run began within the same second
                continue
            return folder.resolve()
    except OSError as error:
        raise RunError(
            f"run.dir={named or runs_root}: the folder cannot be made ({error.strerror}); give one that is writable"
        ) from error
    raise RunError(f"{runs_root}: no free name for {base}; give run.dir=...")


def _lock(folder: Path, wait_s: float = 0.0) -> IO[str]:
    try:
        return hold_lock(folder, wait_s)
    except LockedError as error:
        raise RunError(
            f"run.dir={folder}: in use by {error.holder}; wait for it to end, stop it, or give another run.dir"
        ) from None
    except OSError as error:
        raise RunError(
            f"run.dir={folder}: cannot be written ({error.strerror}); give a folder that is writable"
        ) from error


def _read_stored(folder: Path) -> StoredRun | None:
    if (folder / "run.json").exists():
        if not never_began(folder):
            return read_run(folder)
        # What was refused before it began holds nobody to its configuration.
        for name in ("events.jsonl", "tracking.json", "result.json", "run.json"):
            (folder / name).unlink(missing_ok=True)
        return None
    others = sorted(path.name for path in folder.iterdir() if path.name not in _BEFORE_RUN_JSON)
    others = [name for name in others if not name.endswith(".tmp")]
    if others:
        raise RunError(
            f"run.dir={folder}: expected a run folder, an empty one or none, got one without run.json that holds "
            f"{', '.join(others[:3])}; give another folder"
        )
    return None


def _adopt(config: Config, stored: StoredRun) -> Config:
    """The number of blocks of a step is settled when a run begins; more or fewer workers do not change it."""
    if config.train.blocks_per_step is not None:
        return config
    blocks = stored.raw.get("train", {}).get("blocks_per_step")
    adopted = config.with_values({"train.blocks_per_step": blocks})
    return build_config(adopted.to_dict(), stored.command)


def _compare(stored: StoredRun, command: str, config: Config, extends: bool) -> bool:
    """Whether the total was raised; refuses every other difference."""
    if stored.command != command:
        raise RunError(f"run.dir={stored.dir}: holds a run of {stored.command}, not {command}; give another run.dir")
    before = build_config(stored.raw, stored.command)
    differences = list_differences(before, config)
    if extends and differences and all(line.partition(":")[0] in EXTENDABLE for line in differences):
        return True
    if differences:
        raise RunError(
            f"run.dir={stored.dir}: holds a run of another configuration ({'; '.join(differences)}); "
            f"give another run.dir, or the values it began with (only {_extension(command)} may extend it)",
            differences=differences,
        )
    return False


def _extension(command: str) -> str:
    return "search.num_trials=+N" if command == "search" else "train.epochs=+N"


def _write_new(
    folder: Path, name: str, command: str, config: Config, provenance: Callable[[], Mapping[str, Any]]
) -> None:
    created = datetime.now().astimezone().isoformat(timespec="seconds")
    facts = {"config_hash": hash_config(config), "created": created, **collect_provenance(), **provenance()}
    write_json(folder / "provenance.json", facts)
    write_json(folder / "status.json", {"status": "new", "message": "", "pid": os.getpid(), "host": platform.node()})
    _write_config(folder, name, command, config, created)


def _write_config(folder: Path, name: str, command: str, config: Config, created: str) -> None:
    """``config.yaml`` and then ``run.json``, whose presence makes the folder a run."""
    head = f"# python -m pipeline {command} resume={folder}\n"
    write_text(folder / "config.yaml", head + yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True))
    run = {"name": name, "command": command, "config_hash": hash_config(config), "created": created}
    write_json(folder / "run.json", run | {"version": FORMAT_VERSION})


# --- paths --------------------------------------------------------------------------------------------------------


def _resolve(config: Config, folder: Path) -> Config:
    place = {"run.dir": str(folder), "tracking.uri": _tracking_uri(config.tracking.uri, folder)}
    return settle(config).with_values(place | kept_code(folder))


def settle(config: Config) -> Config:
    """The configuration with absolute paths, and with what is settled when a run begins."""
    values: dict[str, Any] = {}
    if config.train.blocks_per_step is None:
        values["train.blocks_per_step"] = config.cluster.num_workers
    for section, key in _PATHS:
        path = getattr(getattr(config, section), key, None)
        if isinstance(path, str) and "://" not in path:
            values[f"{section}.{key}"] = os.path.abspath(os.path.expanduser(path))
    return config.with_values(values)


def _tracking_uri(uri: str | None, folder: Path) -> str:
    scheme = "sqlite:///"
    if uri is None:
        uri = f"{scheme}{folder.parent / 'mlflow.db'}"
    elif uri.startswith(scheme):
        uri = f"{scheme}{os.path.abspath(os.path.expanduser(uri.removeprefix(scheme)))}"
    if uri.startswith(scheme):
        refuse_vanishing("tracking.uri", Path(uri.removeprefix(scheme)))
    return uri


def refuse_vanishing(key: str, path: Path) -> None:
    """A Ray job runs in an unpacked copy that the cluster deletes after the job.

    Raises:
        RunError: ``path``, given as ``key``, lies in it.
    """
    if "working_dir_files" not in path.resolve().parts:
        return
    example = {
        "run.dir": "/shared/runs/<name>",
        "cache.path": "/shared/cache",
        "out": "/shared/predictions.parquet",
        "tracking.uri": "http://<server>:5000",
    }[key]
    raise RunError(
        f"{key}: {path.resolve()} lies in the job's unpacked working folder and would vanish with the job; "
        f"give {key}={example}, on storage that outlives it"
    )
