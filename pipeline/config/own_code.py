"""The modules that the user's own networks are built by, as a run keeps them: ``code/teacher``, ``code/student``."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from pipeline.config.schema import Config
from pipeline.contracts.own_code import CODE_FOLDER, Code, find_changed, fingerprint_code, write_code
from pipeline.errors import RunError

_ROLES = ("teacher", "student")


def keep_code(run_dir: Path, code: Mapping[str, Code]) -> dict[str, dict[str, str]]:
    """Writes modules into the folder of a new run.

    Args:
        code: for each role (teacher, student) whose network is the user's own.

    Returns:
        what provenance says of them.
    """
    drop_code(run_dir)
    own = {role: modules for role, modules in code.items() if modules}
    for role, modules in own.items():
        write_code(run_dir / CODE_FOLDER / role, modules)
    return {"code": {role: fingerprint_code(modules) for role, modules in own.items()}} if own else {}


def drop_code(run_dir: Path) -> None:
    """Removes what ``keep_code`` wrote."""
    shutil.rmtree(run_dir / CODE_FOLDER, ignore_errors=True)


def kept_code(run_dir: Path) -> dict[str, str]:
    """Keys of the configuration that say where modules are, with where a run keeps them."""
    folders = {role: run_dir / CODE_FOLDER / role for role in _ROLES}
    return {f"{role}.code": str(folder) for role, folder in folders.items() if folder.is_dir()}


def check_code_unchanged(run_dir: Path, config: Config) -> None:
    """Refuses to go on with a run where the user has other modules now than it began with.

    Raises:
        RunError: one that is another, as kept and as it is now.
    """
    for path, kept in kept_code(run_dir).items():
        factory: str | None = getattr(getattr(config, path.partition(".")[0]), "factory", None)
        if factory is None:  # a search that only tries it
            continue
        changed = find_changed(factory.partition(":")[0], Path(kept), [str(Path.cwd()), *sys.path])
        if changed is not None:
            raise RunError(
                f"{run_dir} began with another {changed[1]} than there is now; put back what it began with (it is kept "
                f"as {changed[0]}), go on from another folder to use what is kept, or start a new run"
            )
