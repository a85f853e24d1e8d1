"""What tests share: Ray (nothing but `ray_cluster` starts one in this process), and a student distilled by commands."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.cli.main import main
from tests.integration.commands import STUDENT, TEACHER, Call, Ended, run

FAKE_ACCELERATOR = "fake_accelerator"  # a custom resource: counted, and nothing more
NUM_CPUS = 8  # logical ones, a count as well
NUM_ACCELERATORS = 4


@pytest.fixture(scope="session")
def ray_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A local Ray, started by the first test that asks for it; it takes ten seconds. Gives the path of its log."""
    from pipeline.cluster.session import own_ray

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    log_file = tmp_path_factory.mktemp("ray") / "ray.log"
    with own_ray(NUM_CPUS, log_file, {FAKE_ACCELERATOR: NUM_ACCELERATORS}):
        yield log_file


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """As ``run``, within this process, which saves the imports."""

    def called(folder: Path, *arguments: str) -> Ended:
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "path", [*sys.path])
        capsys.readouterr()
        code = main(arguments)
        return Ended(code, *capsys.readouterr())

    return called


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ended, Ended]:
    """A folder with a teacher and a student distilled from it, and what the two commands said."""
    folder = tmp_path_factory.mktemp("made")
    teacher = run(folder, "train-teacher", "run.dir=runs/teacher", *TEACHER, "train.epochs=2")
    assert teacher.code == 0, teacher.err
    student = run(folder, "distill", "run.dir=runs/student", *STUDENT, "train.epochs=3", "run.seed=5")
    assert student.code == 0, student.err
    return folder, teacher, student


@pytest.fixture
def workspace(made: tuple[Path, Ended, Ended], tmp_path: Path) -> Path:
    """A folder with its own copy of the teacher."""
    shutil.copytree(made[0] / "runs" / "teacher", tmp_path / "runs" / "teacher")
    return tmp_path


@pytest.fixture(scope="module")
def search_place(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A folder with a cache, and what a search in it is given: then no pool of teachers has to start."""
    from tests.integration.searches import CONFIRM, prepare  # with torch

    folder = tmp_path_factory.mktemp("searches")
    overrides = prepare(folder)
    assert main(["cache", "build", *overrides, "cluster=inprocess", f"run.dir={folder / 'build'}"]) == 0
    return folder, [*overrides, *CONFIRM]
