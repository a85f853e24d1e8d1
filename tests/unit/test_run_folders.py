"""Run folders: who may use one, and what is kept in it."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.runs import open_run
from pipeline.config.stored import find_run, read_run
from pipeline.errors import RunError
from tests.unit.runs import TEACHER, build, go_on, open_and_close

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.usefixtures("working_folder")

# --- folders that cannot be used ----------------------------------------------------------------------------------


def test_one_process_at_a_time() -> None:
    in_use = rf"in use by process {os.getpid()} on .*; wait for it to end"
    with open_run("distill", build("run.dir=a")), pytest.raises(RunError, match=in_use):
        open_run("distill", build("run.dir=a"))
    assert open_and_close("run.dir=a").resumed


def test_who_waits_has_the_folder_once_it_is_left(working_folder: Path) -> None:
    first = open_run("distill", build("run.dir=a"))
    leaves = threading.Timer(0.3, first.close)
    leaves.start()
    with open_run("distill", build("run.dir=a"), wait_s=60.0) as run:
        assert run.resumed
    leaves.join()


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    code = (
        "import os, sys; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path\n"
        "from pipeline.config.runs import _lock\n"
        "lock = _lock(Path(sys.argv[2])); print('held', flush=True); sys.stdin.read()"
    )
    open_and_close("run.dir=a")
    arguments = [sys.executable, "-c", code, str(ROOT), str(tmp_path / "a")]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(RunError, match=f"in use by process {process.pid} "):
            open_and_close("run.dir=a")
        process.kill()
    assert open_and_close("run.dir=a").resumed


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("x")
    with pytest.raises(RunError, match=r"without run.json that holds chapter.tex; give another folder"):
        open_and_close("run.dir=thesis")
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunError, match=r"run.dir=file: the folder cannot be made"):
        open_and_close("run.dir=file")


def test_a_start_that_died_is_started_again(tmp_path: Path) -> None:
    def die() -> dict[str, Any]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_run("distill", build("run.dir=a"), provenance=die)
    run = open_and_close("run.dir=a")
    assert not run.resumed
    with pytest.raises(KeyboardInterrupt):
        open_run("distill", build(), provenance=die)
    assert list((tmp_path / "runs").iterdir()) == []


@pytest.mark.parametrize("name", ["run.json", "config.yaml", "status.json"])
def test_a_damaged_folder_is_said_to_be(name: str) -> None:
    run = open_and_close("run.dir=a")
    (run.dir / name).write_text("{")
    with pytest.raises(RunError, match=rf"a/{name}: cannot be read .*; the run folder is damaged"):
        open_and_close("run.dir=a")


def test_a_folder_that_vanishes_with_the_job_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unpacked = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_0"
    unpacked.mkdir(parents=True)
    monkeypatch.chdir(unpacked)
    for overrides in ([], ["run.dir=runs/x"]):
        with pytest.raises(RunError, match=r"run.dir: .* would vanish with the job; give run.dir=/shared/"):
            open_and_close(*overrides)
    shared = f"run.dir={tmp_path}/shared/x"
    with pytest.raises(RunError, match=r"tracking.uri: .* would vanish with the job"):
        open_and_close(shared, "tracking.uri=sqlite:///mlflow.db")
    with pytest.raises(RunError, match=r"cache.path: .* would vanish with the job; give cache.path=/shared/cache"):
        open_and_close(shared, "cache.path=runs/cache")
    assert list(unpacked.iterdir()) == []
    assert open_and_close(shared).config.tracking.uri == f"sqlite:///{tmp_path}/shared/mlflow.db"


def test_run_that_never_began_leaves_its_folder_to_another(tmp_path: Path) -> None:
    with open_run("distill", build("run.dir=mine", "train.batch_size=999")) as run:
        run.discard()
    assert not (tmp_path / "mine").exists()
    go_on("run.dir=mine", TEACHER)
    with open_run("distill", build("run.dir=mine")) as run:
        run.discard()  # gone on with: what there is stays
    assert (tmp_path / "mine" / "run.json").exists()


def test_run_that_was_refused_holds_nobody_to_its_configuration(tmp_path: Path) -> None:
    with open_run("distill", build("run.dir=mine", "train.batch_size=32")) as run:
        (run.dir / "events.jsonl").write_text("{}\n")
        run.write_result("failed", {}, exit_code=2, error="the cluster is too small")
    with open_run("distill", build("run.dir=mine", "train.batch_size=64")) as run:
        assert not run.resumed
        assert run.config.train.batch_size == 64
        assert not (run.dir / "events.jsonl").exists()
        run.write_result("failed", {}, exit_code=1, error="it went on for a while")
    with pytest.raises(RunError, match="64 -> 32"):
        open_and_close("run.dir=mine", "train.batch_size=32")


# --- what is kept -------------------------------------------------------------------------------------------------


def test_runs_are_found_by_path_and_name() -> None:
    run = open_and_close()
    assert find_run(run.dir.name) == find_run(str(run.dir)) == run.dir
    stored = read_run(run.dir)
    assert (stored.name, stored.command, stored.status) == (run.name, "distill", "new")


def test_the_result_is_plain_json() -> None:
    with open_run("distill", build("run.dir=a")) as run:
        (run.dir / "tracking.json").write_text('{"run_id": "abc", "uri": "sqlite:///x", "offset": 0}')
        path = run.write_result("finished", {"val/top1": 0.5, "val/ece": math.nan}, {"best_step": 3})
        assert path == run.result_path == run.dir / "result.json"
        assert json.loads(path.read_text()) == {
            "status": "finished",
            "run_dir": str(run.dir),
            "mlflow_run_id": "abc",
            "config_hash": run.config_hash,
            "metrics": {"val/top1": 0.5, "val/ece": None},
            "exit_code": 0,
            "best_step": 3,
        }
        assert run.read_status() == "finished"
        assert run.finished


def test_a_failure_is_kept_with_its_sentence() -> None:
    with open_run("distill", build("run.dir=a")) as run:
        run.set_status("running")
        result = json.loads(run.write_result("failed", {}, exit_code=1, error="the loss is not finite").read_text())
        assert (result["exit_code"], result["error"], result["mlflow_run_id"]) == (1, "the loss is not finite", None)
        status = json.loads((run.dir / "status.json").read_text())
        assert (status["status"], status["message"], status["pid"]) == ("failed", "the loss is not finite", os.getpid())
    assert open_and_close("run.dir=a").resumed
