"""Where a run comes from: code, versions, machine."""

from __future__ import annotations

import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pipeline

_PACKAGES = ("ray", "torch", "torchvision", "mlflow", "numpy", "pyarrow", "pydantic", "hydra-core", "distill-pipeline")


def collect_provenance() -> dict[str, Any]:
    """Git state of the code, versions of Python and packages, and the host."""
    return {
        "git": _git_state(Path(pipeline.__file__).parent),
        "versions": {"python": platform.python_version()} | {name: find_version(name) for name in _PACKAGES},
        "platform": {
            "host": platform.node(),
            "system": platform.platform(),
            "machine": platform.machine(),
            "executable": sys.executable,
        },
    }


def find_version(package: str) -> str | None:
    """Of an installed package; none where there is none of that name, as of this one in a mere checkout."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_state(folder: Path) -> dict[str, Any] | None:
    """Commit, and whether tracked files differ from it; none outside a repository or without git."""
    commit = _git(folder, "rev-parse", "HEAD")
    # An installed package may lie inside some other project's repository: its commit would be a lie.
    if commit is None or _git(folder, "ls-files", "__init__.py") != "__init__.py":
        return None
    return {"commit": commit, "dirty": bool(_git(folder, "status", "--porcelain", "--untracked-files=no"))}


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        result = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None
