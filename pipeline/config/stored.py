"""Reading run folders: which configuration made them, and how far they got."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from pipeline.config.schema import Config, drop_path, flatten
from pipeline.errors import RunError

RunStatus = Literal["new", "running", "finished", "failed", "killed"]

# Of what run folders hold; to be raised when older code could no longer read it, or would read it wrongly.
FORMAT_VERSION = 1

# Where a run happens and what it is called; the rest is what it computes.
_NOT_IDENTITY = (
    "run.dir",
    "run.name",
    "cluster",
    "tracking",
    "teacher.pool",
    "teacher.code",
    "student.code",
    "cache.path",
    "search.max_concurrent",
    "search.time_budget_s",
)

# Where something lies that may be moved: what is there is compared by its fingerprint.
_MOVABLE = ("teacher.checkpoint",)

# Totals that a later command may raise with key=+N; all else of a run stays as it began.
EXTENDABLE = ("train.epochs", "search.num_trials")


@dataclass(frozen=True)
class StoredRun:
    """A run folder as found on disk; nothing is locked or changed.

    Attributes:
        dir: absolute path.
        name: as shown in the tracker.
        command: the subcommand that made it.
        config_hash: see ``hash_config``.
        raw: the stored configuration as plain values.
        status: how far it got.
    """

    dir: Path
    name: str
    command: str
    config_hash: str
    raw: dict[str, Any]
    status: RunStatus


def find_run(run: str, runs_root: Path = Path("runs")) -> Path:
    """The folder meant by a path or by a name under ``runs_root``.

    Raises:
        RunError: there is no such run folder.
    """
    candidates = (Path(run).expanduser(), runs_root / run)
    for folder in candidates:
        if (folder / "run.json").is_file():
            return folder.resolve()
    tried = " and ".join(str(folder) for folder in dict.fromkeys(candidates))
    raise RunError(f"no run {run!r}: expected a run folder (one with run.json) at {tried}; see `ls {runs_root}`")


def read_run(folder: Path) -> StoredRun:
    """Reads a run folder.

    Raises:
        RunError: a file of it is missing or damaged, or a newer version of this package made it.
    """
    folder = folder.resolve()
    run = read_json(folder / "run.json")
    version = run.get("version", 1)  # the first versions did not write it
    if version > FORMAT_VERSION:
        raise RunError(
            f"{folder}: made by a newer version of this package (its files have version {version}, expected at most "
            f"{FORMAT_VERSION}); update the package, or start a new run"
        )
    try:
        raw = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise _damaged(folder / "config.yaml", error) from error
    if not isinstance(raw, dict):
        raise _damaged(folder / "config.yaml", ValueError("no keys and values in it"))
    status = read_json(folder / "status.json")
    try:
        return StoredRun(folder, run["name"], run["command"], run["config_hash"], raw, status["status"])
    except KeyError as error:
        raise _damaged(folder, error) from error


def never_began(folder: Path) -> bool:
    """Whether the run was refused (exit code 2) before any work, so that nothing of it is there to go on with."""
    result = folder / "result.json"
    if not result.exists() or any((folder / name).exists() for name in ("checkpoints", "ray", "model")):
        return False
    values = read_json(result)
    return values.get("status") == "failed" and values.get("exit_code") == 2


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a run folder.

    Raises:
        RunError: missing or damaged.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from error
    if not isinstance(values, dict):
        raise _damaged(path, ValueError("no object in it"))
    return values


def write_text(path: Path, text: str) -> None:
    """Writes a file so that a reader finds the old or the new text, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def identity(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a configuration that says what a run computes."""
    part: dict[str, Any] = json.loads(json.dumps(raw))
    for path in _NOT_IDENTITY:
        drop_path(part, path)
    return part


def hash_config(config: Config) -> str:
    """12 hexadecimal digits of SHA-256 over the identity as canonical JSON (sorted keys, no spaces)."""
    text = json.dumps(identity(config.to_dict()), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def list_differences(stored: Config, given: Config) -> list[str]:
    """``path: stored -> given`` for every field of the identity that differs, but for those that may be moved."""
    old, new = flatten(identity(stored.to_dict())), flatten(identity(given.to_dict()))
    lines = []
    for path in sorted(old.keys() | new.keys()):
        if path not in _MOVABLE and old.get(path) != new.get(path):
            lines.append(f"{path}: {old.get(path, '(absent)')} -> {new.get(path, '(absent)')}")
    return lines


def _damaged(path: Path, error: Exception) -> RunError:
    reason = f"{error.strerror}" if isinstance(error, OSError) and error.strerror else str(error).splitlines()[0]
    return RunError(f"{path}: cannot be read ({reason}); the run folder is damaged, restore it or start a new run")
