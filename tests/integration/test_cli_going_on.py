"""Runs that are gone on with, refused or failed, without Ray: exit codes, and a tracking server that is away."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.integration.commands import (
    STUDENT,
    TIMEOUT_S,
    Call,
    Ended,
    events_of,
    history_of,
    mlflow_client,
    read_result,
    spawn,
    wait_until,
)
from tests.integration.mlflow_server import Server

NOTHING_LISTENS = "http://127.0.0.1:9"

# --- going on -----------------------------------------------------------------------------------------------------


def test_finished_run_says_so(made: tuple[Path, Ended, Ended], call: Call) -> None:
    folder, run_dir = made[0], made[0] / "runs" / "student"
    before = {name: (run_dir / name).read_bytes() for name in ("events.jsonl", "result.json", "config.yaml")}
    for arguments in (
        ("distill", "resume=student"),
        ("distill", f"resume={run_dir}"),
        ("distill", "run.dir=runs/student", *STUDENT, "train.epochs=3", "run.seed=5"),
    ):
        ended = call(folder, *arguments)
        assert ended.code == 0, ended.err
        assert "is finished" in ended.out
        assert "top1" in ended.out
        assert ended.last_line == str(run_dir / "result.json")
    assert {name: (run_dir / name).read_bytes() for name in before} == before


def test_another_configuration_is_refused_with_the_fields(made: tuple[Path, Ended, Ended], call: Call) -> None:
    for changes in (["resume=student"], ["run.dir=runs/student", *STUDENT, "train.epochs=3", "run.seed=5"]):
        ended = call(made[0], "distill", *changes, "loss.temperature=2", "train.optimizer.lr=0.01")
        assert ended.code == 2
        assert "loss.temperature: 4.0 -> 2" in ended.err
        assert "train.optimizer.lr: 0.1 -> 0.01" in ended.err
        assert "Traceback" not in ended.err
    ended = call(made[0], "train-teacher", "resume=student")
    assert ended.code == 2
    assert "python -m pipeline distill resume=student" in ended.err
    assert read_result(made[0] / "runs" / "student")["status"] == "finished"


def test_more_epochs_extend_a_finished_run(workspace: Path, call: Call) -> None:
    run_dir = workspace / "runs" / "student"
    assert call(workspace, "distill", f"run.dir={run_dir}", *STUDENT, "train.epochs=1").code == 0
    first = read_result(run_dir)
    ended = call(workspace, "distill", "resume=student", "train.epochs=+2")
    assert ended.code == 0, ended.err
    plans = events_of(run_dir, "plan")
    assert [(plan["start_step"], plan["num_steps"]) for plan in plans] == [(0, 19), (19, 57)]
    result = read_result(run_dir)
    assert result["mlflow_run_id"] == first["mlflow_run_id"]
    assert result["best_epoch"] in (1, 2, 3)

    client = mlflow_client(f"sqlite:///{workspace}/runs/mlflow.db")
    stored = client.get_run(result["mlflow_run_id"])
    assert stored.info.status == "FINISHED"
    assert stored.data.tags["resumed.train.epochs"] == "3"
    assert [step for step, _ in history_of(client, stored.info.run_id, "val/top1")] == [19, 38, 57]

    # Another total is not an extension, and a run is extended by typing it: once.
    assert call(workspace, "distill", "resume=student", "train.epochs=9").code == 2
    assert "is finished" in call(workspace, "distill", "resume=student").out


def test_run_is_not_gone_on_with_under_another_teacher(workspace: Path, call: Call) -> None:
    run_dir = workspace / "runs" / "student"
    assert call(workspace, "distill", f"run.dir={run_dir}", *STUDENT, "train.epochs=1").code == 0
    assert call(workspace, "train-teacher", "resume=teacher", "train.epochs=+1").code == 0
    ended = call(workspace, "distill", "resume=student", "train.epochs=+1")
    assert ended.code == 2
    assert "began with teacher of fingerprint" in ended.err
    assert read_result(run_dir)["status"] == "finished"


# --- failing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["distill", "cluster=inprocess"], "teacher.checkpoint: not set"),
        (["distill", *STUDENT, "teacher.checkpoint=runs/nobody"], "runs/nobody"),
        (["distill", *STUDENT, "student.hiden=[3]"], "student.hidden"),
        (["distill", *STUDENT, "teacher.width=8"], "width"),
        (["distill", *STUDENT, "train.batch_size=100000"], "train.batch_size"),
        (["distill", "resume=nobody"], "no run 'nobody'"),
        (["train-teacher", "cluster=inprocess", "data=parquet", "data.path=nowhere"], "nowhere"),
        (["evaluate"], "run=RUN"),
    ],
)
def test_what_is_wrong_before_work_began_ends_with_2(
    workspace: Path, call: Call, arguments: list[str], sentence: str
) -> None:
    ended = call(workspace, *arguments)
    assert ended.code == 2
    assert sentence in ended.err
    assert "Traceback" not in ended.err
    assert [path.name for path in (workspace / "runs").iterdir()] == ["teacher"]


def test_failed_run_ends_with_1_and_says_where(workspace: Path, call: Call) -> None:
    run_dir = workspace / "runs" / "diverging"
    ended = call(workspace, "distill", f"run.dir={run_dir}", *STUDENT, "train.optimizer.lr=1e30", "train.log_every=1")
    assert ended.code == 1
    assert ended.err.startswith("NonFiniteError: ")
    assert "the weights were not updated" in ended.err
    assert ended.last_line == str(run_dir / "result.json")
    result = read_result(run_dir)
    assert (result["status"], result["exit_code"]) == ("failed", 1)
    assert result["error"] in ended.err
    stored = mlflow_client(f"sqlite:///{workspace}/runs/mlflow.db").get_run(result["mlflow_run_id"])
    assert stored.info.status == "FAILED"
    assert stored.data.tags["status_message"] == result["error"]


def test_unreachable_tracking_ends_with_2(workspace: Path, call: Call) -> None:
    arguments = ["distill", "run.dir=runs/student", *STUDENT, "train.epochs=1"]
    ended = call(workspace, *arguments, f"tracking.uri={NOTHING_LISTENS}")
    assert ended.code == 2
    assert NOTHING_LISTENS in ended.err
    assert "tracking.required=false" in ended.err
    # The same run goes on where it can be tracked.
    ended = call(workspace, *arguments)
    assert ended.code == 0, ended.err
    assert read_result(workspace / "runs" / "student")["status"] == "finished"


# --- a tracking server that is away -------------------------------------------------------------------------------


@pytest.mark.slow
def test_run_without_its_server_is_sent_later(workspace: Path, call: Call) -> None:
    server = Server(workspace)
    run_dir = workspace / "runs" / "student"
    arguments = ["distill", f"run.dir={run_dir}", *STUDENT, "train.epochs=2"]
    arguments += [f"tracking.uri={server.uri}", "tracking.required=false"]
    ended = call(workspace, *arguments)
    assert ended.code == 0, ended.err
    assert "not everything was sent" in ended.out
    assert read_result(run_dir)["mlflow_run_id"] is None
    # Still away: a finished run is shown all the same.
    ended = call(workspace, *arguments)
    assert (ended.code, ended.last_line) == (0, str(run_dir / "result.json"))
    assert "not everything was sent" in ended.out
    server.start()
    try:
        ended = call(workspace, "distill", "resume=student")
        assert ended.code == 0, ended.err
        result = read_result(run_dir)
        stored = mlflow_client(server.uri).get_run(result["mlflow_run_id"])
        assert (stored.info.status, len(stored.outputs.model_outputs)) == ("FINISHED", 1)
        assert stored.data.metrics["test/top1"] == result["metrics"]["test/top1"]
        assert "tracking" not in call(workspace, "distill", "resume=student").out
    finally:
        server.kill()


@pytest.mark.slow
def test_server_that_crashes_during_a_run_has_all_of_it(workspace: Path) -> None:
    server = Server(workspace)
    run_dir = workspace / "runs" / "student"
    server.start()
    arguments = ["distill", f"run.dir={run_dir}", *STUDENT, f"tracking.uri={server.uri}"]
    process = spawn(workspace, *arguments, "train.epochs=400", "train.evaluate_every=10", "train.log_every=5")
    try:

        def has_steps(count: int) -> bool:
            assert process.poll() is None, process.communicate()
            return len(events_of(run_dir, "step")) >= count

        def sent() -> int:
            path = run_dir / "tracking.json"
            return int(json.loads(path.read_text())["step"]) if path.exists() else 0

        wait_until(lambda: has_steps(1) and sent() > 0, lambda: str(run_dir))
        server.kill()
        seen = len(events_of(run_dir, "step"))
        wait_until(lambda: has_steps(seen + 200), lambda: str(run_dir))
        server.start()
        out, err = process.communicate(timeout=TIMEOUT_S)
    finally:
        process.kill()
        process.communicate()
    try:
        assert process.returncode == 0, err
        assert "not everything was sent" not in out
        client = mlflow_client(server.uri)
        run_id = read_result(run_dir)["mlflow_run_id"]
        for kind, metric in (("step", "train/loss"), ("evaluation", "val/top1")):
            events = [event for event in events_of(run_dir, kind) if metric in event["metrics"]]
            wanted = [(event["step"], event["metrics"][metric]) for event in events]
            assert history_of(client, run_id, metric) == wanted
        assert client.get_run(run_id).info.status == "FINISHED"
    finally:
        server.kill()
