"""The architecture's rules about imports, and what a process pays for them."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_layers_hold() -> None:
    # A process of its own, because it turns off the loggers of the one it runs in.
    code = "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_cache=True, no_logo=True))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("pipeline.cli.main", {"torch", "ray", "mlflow", "hydra", "pydantic", "numpy", "yaml"}),
        ("pipeline.contracts.events", {"torch", "ray", "numpy", "pydantic"}),
        ("pipeline.data", {"torch", "ray", "mlflow", "hydra"}),
        ("pipeline.config.runs", {"torch", "ray", "mlflow"}),
        ("pipeline.training", {"ray", "mlflow", "hydra"}),
    ],
)
def test_what_an_import_does_not_load(module: str, absent: set[str]) -> None:
    code = f"import sys, {module}; print(*sorted({absent!r} & set(sys.modules)))"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert loaded.split() == []


def test_every_package_is_in_the_wheel() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    found = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for path in (ROOT / "pipeline").rglob("*.py")
        if "__pycache__" not in path.parts
    }
    assert set(settings["tool"]["setuptools"]["packages"]) == found | {"pipeline.conf"}


@pytest.mark.parametrize("folder", ["pipeline", "jobs"])
def test_files_stay_readable(folder: str) -> None:
    long = [str(path) for path in (ROOT / folder).rglob("*.py") if len(path.read_text().splitlines()) >= 400]
    assert long == []
