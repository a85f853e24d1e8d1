"""What every mistake is made with: a folder of its own, a trained teacher, a tracking database."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from pipeline.cli.main import main
from tests.integration.mistakes.table import Place

# Set, they would change what is said of tracking servers and of object storage.
_ENVIRONMENT = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "AWS_ENDPOINT_URL")


@pytest.fixture(scope="session")
def tracking(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One database for all, because making one takes seconds."""
    return f"tracking.uri=sqlite:///{tmp_path_factory.mktemp('tracking')}/mlflow.db"


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory, tracking: str) -> Path:
    """A finished run of ``train-teacher`` on the digits."""
    folder = tmp_path_factory.mktemp("teacher") / "run"
    arguments = ["teacher.width=4", "train.epochs=1", "cluster=inprocess", tracking]
    assert main(["train-teacher", f"run.dir={folder}", *arguments]) == 0
    return folder


@pytest.fixture
def place(teacher: Path, tracking: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])  # a network of one's own puts its folder in front
    for name in _ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    with ExitStack() as stack:
        yield Place(tmp_path, teacher, tracking, monkeypatch, stack)
