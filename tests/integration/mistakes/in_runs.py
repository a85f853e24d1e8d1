"""Mistakes with run folders and tracking servers."""

from __future__ import annotations

import fcntl
import json
import os
import resource
import shutil
from pathlib import Path

from pipeline.cli.main import main
from pipeline.contracts.checkpoints import read_cursor
from tests.integration.mistakes.server import serve
from tests.integration.mistakes.table import Place, mistake

CLOSED = "http://127.0.0.1:9"  # the discard port: nothing listens


def copy_run(place: Place) -> Path:
    """A run folder of the case's own: the teacher's."""
    return Path(shutil.copytree(place.teacher, place.folder / "runs" / "old"))


def edit_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# --- going on -----------------------------------------------------------------------------------------------------


@mistake("`resume` of what is no run")
def _(place: Place) -> list[str]:
    return ["distill", "resume=runs/nobody"]


@mistake("`resume` by another command")
def _(place: Place) -> list[str]:
    copy_run(place)
    return ["distill", "resume=runs/old"]


@mistake("a run folder of another configuration")
def _(place: Place) -> list[str]:
    copy_run(place)
    return ["train-teacher", "resume=runs/old", "train.batch_size=32", "train.optimizer.lr=0.2"]


@mistake("more epochs of no run")
def _(place: Place) -> list[str]:
    return place.train("train.epochs=+5")


@mistake("a run folder that another process uses")
def _(place: Place) -> list[str]:
    lock = place.stack.enter_context((copy_run(place) / ".lock").open("w"))
    lock.write("process 4242 on another-host\n")
    lock.flush()
    fcntl.flock(lock, fcntl.LOCK_EX)
    return ["train-teacher", "resume=runs/old"]


@mistake("a run folder made by a newer version")
def _(place: Place) -> list[str]:
    edit_json(copy_run(place) / "run.json", version=99)
    return ["train-teacher", "resume=runs/old"]


@mistake("a run folder with a damaged file")
def _(place: Place) -> list[str]:
    (copy_run(place) / "status.json").write_text("")
    return ["train-teacher", "resume=runs/old"]


@mistake("other data than the run began with")
def _(place: Place) -> list[str]:
    edit_json(copy_run(place) / "provenance.json", data="0123456789abcdef")
    return ["train-teacher", "resume=runs/old", "train.epochs=+1"]


@mistake("a damaged checkpoint in a run folder", run="runs/old")
def _(place: Place) -> list[str]:
    (copy_run(place) / "checkpoints" / "last" / "state.pt").write_bytes(b"PK")
    return ["train-teacher", "resume=runs/old", "train.epochs=+1"]


# --- where a run goes ---------------------------------------------------------------------------------------------


@mistake("a file where the run folder should be")
def _(place: Place) -> list[str]:
    (place.folder / "notes").write_text("mine")
    return place.train("run.dir=notes/run")


@mistake("a run folder with something else in it")
def _(place: Place) -> list[str]:
    (place.folder / "thesis").mkdir()
    (place.folder / "thesis" / "chapter.tex").touch()
    return place.train("run.dir=thesis")


@mistake("a run folder on object storage")
def _(place: Place) -> list[str]:
    return place.train("run.dir=s3://bucket/runs/new")


@mistake("a run folder inside a job's unpacked copy")
def _(place: Place) -> list[str]:
    folder = place.folder / "working_dir_files" / "package"
    folder.mkdir(parents=True)
    place.monkeypatch.chdir(folder)
    return place.train()


@mistake("a disk that is full")
def _(place: Place) -> list[str]:
    """A limit on the size of files stands in for the disk: only the checkpoint is larger."""
    wide = "teacher.hidden=[512,512]"
    assert main(place.train(wide, "cluster=inprocess")) == 0
    last = place.folder / "runs" / "new" / "checkpoints" / "last"
    before = {path.name: path.read_bytes() for path in last.iterdir()}
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)

    def lift() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)

    def check() -> None:
        lift()
        assert {path.name: path.read_bytes() for path in last.iterdir()} == before
        assert main(["train-teacher", "resume=runs/new"]) == 0
        assert read_cursor(last) == 2 * json.loads(before["cursor.json"])["cursor"]

    assert len(before["state.pt"]) > 2**21
    place.checks.append(check)
    place.stack.callback(lift)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**21, unlimited[1]))
    return ["train-teacher", "resume=runs/new", "train.epochs=+1"]


# --- tracking -----------------------------------------------------------------------------------------------------


@mistake("a tracking server that cannot be reached")
def _(place: Place) -> list[str]:
    return place.train(f"tracking.uri={CLOSED}")


@mistake("a web server that is no tracking server")
def _(place: Place) -> list[str]:
    return place.train(f"tracking.uri=http://{serve(place.stack, 200, b'<html>welcome</html>')}")


@mistake("a folder of files as tracking server")
def _(place: Place) -> list[str]:
    return place.train("tracking.uri=mlruns")


@mistake("a tracking database that is none")
def _(place: Place) -> list[str]:
    (place.folder / "mlflow.db").write_bytes(os.urandom(4096))
    return place.train(f"tracking.uri=sqlite:///{place.folder}/mlflow.db")
