"""A checkout that is not installed, beside MLflow's smaller distribution: versions that have no name there."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest

import pipeline.tracking.model as tracked
from pipeline.config.provenance import collect_provenance, find_version
from pipeline.config.runs import open_run
from pipeline.execution.caching import describe_origin
from pipeline.tracking.quiet import import_mlflow
from tests.unit.runs import build


@pytest.fixture(autouse=True)
def _only_others_are_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    version = metadata.version

    def found(name: str) -> str:
        if name in ("distill-pipeline", "mlflow"):
            raise metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(metadata, "version", found)
    monkeypatch.setattr(tracked, "version", found)


def test_versions_that_are_not_known_are_none_or_left_out(working_folder: Path) -> None:
    assert find_version("distill-pipeline") is None
    assert collect_provenance()["versions"]["distill-pipeline"] is None
    with open_run("distill", build()) as run:
        versions = describe_origin(run)["versions"]
    assert "distill-pipeline" not in versions
    assert versions["numpy"] == metadata.version("numpy")


def test_a_logged_model_requires_mlflow_by_its_own_word() -> None:
    assert tracked._version("mlflow") == import_mlflow().__version__
    assert tracked._version("numpy") == metadata.version("numpy")
