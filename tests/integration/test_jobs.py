"""Runs as Ray jobs: submitted to a head of their own from this folder, stopped, and gone on with.

Three fits and a search, all of them slow.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipeline.contracts.events import read_events

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
START_TIMEOUT_S = 300.0
RUN_TIMEOUT_S = 500.0
NUM_STEPS = 40 * 19  # 40 epochs; 1,258 digits are left to train on, 19 blocks of 64 an epoch
TINY = ["teacher.width=4", "student=mlp", "student.hidden=[16]", "train.num_threads=1"]


class Head:
    """``ray start --head`` on free ports, with tokens required; all its processes end with it."""

    def __init__(self, folder: Path) -> None:
        ports = free_ports(4)
        self.address = f"http://127.0.0.1:{ports[1]}"
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",  # a job's `python` is the head's
            "OMP_NUM_THREADS": "1",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(16),
            "RAY_API_SERVER_ADDRESS": self.address,
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        command = [str(BIN / "ray"), "start", "--head", "--block", "--num-cpus=8", f"--temp-dir={folder}"]
        command += [f"--port={ports[0]}", f"--dashboard-port={ports[1]}", "--dashboard-host=127.0.0.1"]
        command += [f"--dashboard-agent-listen-port={ports[2]}", f"--ray-client-server-port={ports[3]}"]
        command += ["--object-store-memory=200000000", "--node-ip-address=127.0.0.1", "--disable-usage-stats"]
        self.folder = folder
        self._log = folder / "head.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command, cwd=folder, env=self.environment, stdout=log, stderr=log, start_new_session=True
            )

    def wait(self) -> None:
        """Until the job server answers."""
        wait_until(self._answers, START_TIMEOUT_S, self._log.read_text)

    def _answers(self) -> bool:
        assert self._process.poll() is None, self._log.read_text()
        token = {"Authorization": f"Bearer {self.environment['RAY_AUTH_TOKEN']}"}
        try:
            request = urllib.request.Request(f"{self.address}/api/jobs/", headers=token)
            with urllib.request.urlopen(request, timeout=5) as reply:
                return bool(reply.status == 200)
        except OSError:
            return False

    def close(self) -> None:
        """Ends the head and whatever it started, also where that left its process group."""
        with contextlib.suppress(psutil.NoSuchProcess):
            children = psutil.Process(self._process.pid).children(recursive=True)
            self._process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(5)
            for child in children:
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
            psutil.wait_procs(children, timeout=30)
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def run(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """A command as a user types it in this repository's root."""
        return subprocess.run(
            command,
            cwd=ROOT,
            env=self.environment | environment,
            capture_output=True,
            text=True,
            timeout=RUN_TIMEOUT_S,
            check=False,
        )

    def job(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self.run(str(BIN / "ray"), "job", *arguments)

    def submit(self, *arguments: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
        return self.job("submit", "--working-dir", ".", *options, "--", "python", "-m", "pipeline", *arguments)


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for probe in sockets:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in sockets]
    for probe in sockets:
        probe.close()
    return ports


def wait_until(condition: Callable[[], object], timeout_s: float, explain: Callable[[], str]) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, explain()
        time.sleep(0.1)  # between two polls


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    # Ray's sockets lie under its folder, and a socket's path may have 107 characters.
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        head = Head(Path(folder))
        try:
            head.wait()
            yield head
        finally:
            head.close()


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of ``train-teacher``, made without Ray."""
    folder = tmp_path_factory.mktemp("teachers") / "teacher"
    command = [sys.executable, "-m", "pipeline", "train-teacher", f"run.dir={folder}", "cluster=inprocess"]
    command += ["teacher.width=4", "train.epochs=1"]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, timeout=120)
    return folder


def read(run_dir: Path, name: str) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((run_dir / name).read_text())
    return values


def events_of(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    events = [event for event, _ in read_events(run_dir / "events.jsonl")]
    return [event.data for event in events if event.kind == kind]


def checkpoints_of(run_dir: Path) -> list[int]:
    return [event["step"] for event in events_of(run_dir, "checkpoint")]


@pytest.mark.timeout(900)
def test_job_runs_to_its_end(head: Head, teacher: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "student"
    done = head.run(
        "jobs/submit.sh", "distill", *TINY, "train.epochs=2", RUNS=str(tmp_path), TEACHER=str(teacher), NAME="student"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "succeeded" in done.stdout
    result = read(run_dir, "result.json")
    assert (result["status"], result["exit_code"], result["run_dir"]) == ("finished", 0, str(run_dir))
    assert {"val/top1", "test/top1"} <= result["metrics"].keys()
    assert result["mlflow_run_id"]
    assert (tmp_path / "mlflow.db").exists()
    own = [line for line in done.stdout.splitlines() if line.startswith("/")]
    assert own[-1] == str(run_dir / "result.json")
    unpacked = [path.name for path in head.folder.glob("session_*/runtime_resources/working_dir_files/*/*")]
    assert {"pipeline", "conf", "jobs"} <= set(unpacked)
    assert not {".venv", ".git", "runs", "tests", ".mypy_cache"} & set(unpacked)


@pytest.mark.timeout(900)
def test_search_as_a_job(head: Head, teacher: Path, tmp_path: Path) -> None:
    options = ["search=temperature", "search.num_trials=2", "search.confirm.top=1", "search.confirm.seeds=1"]
    done = head.run(
        "jobs/submit.sh", "search", *TINY, *options, "train.epochs=1", RUNS=str(tmp_path), TEACHER=str(teacher)
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = read(tmp_path / "search", "result.json")
    assert (result["status"], result["exit_code"]) == ("finished", 0)
    assert result["metrics"]["teacher/rows_computed"] > 0
    assert [path.name for path in (tmp_path / "cache").iterdir()]
    assert "wins: " in done.stdout or "no trial beats the defaults" in done.stdout


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        ((), "run.dir"),
        (("tracking.uri=sqlite:///mlflow.db", "run.dir={outside}"), "tracking.uri"),
    ],
)
def test_run_that_would_vanish_with_the_job_is_refused(
    head: Head, teacher: Path, tmp_path: Path, overrides: tuple[str, ...], key: str
) -> None:
    overrides = tuple(text.format(outside=tmp_path / "run") for text in overrides)
    done = head.submit("distill", *TINY, f"teacher.checkpoint={teacher}", *overrides)
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"RunError: {key}: " in done.stdout
    assert "would vanish with the job" in done.stdout


@pytest.mark.timeout(1200)
def test_stopped_job_is_finished_by_resume(head: Head, teacher: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "student"
    arguments = [*TINY, f"teacher.checkpoint={teacher}", f"run.dir={run_dir}", "train.epochs=40"]
    arguments += ["train.evaluate_every=10", "train.checkpoint_every=19"]
    submitted = head.submit("distill", *arguments, options=("--no-wait", "--submission-id=to-be-stopped"))
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    wait_until(lambda: checkpoints_of(run_dir), RUN_TIMEOUT_S, lambda: head.job("logs", "to-be-stopped").stdout)
    stopped = head.job("stop", "to-be-stopped")
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    assert "STOPPED" in head.job("status", "to-be-stopped").stdout.upper()
    assert (read(run_dir, "status.json")["status"], read(run_dir, "result.json")["status"]) == ("killed", "killed")
    reached = max(checkpoints_of(run_dir))
    assert reached < NUM_STEPS

    done = head.submit("distill", f"resume={run_dir}")
    assert done.returncode == 0, done.stdout + done.stderr
    result = read(run_dir, "result.json")
    assert (result["status"], result["exit_code"]) == ("finished", 0)
    assert [plan["start_step"] > 0 for plan in events_of(run_dir, "plan")] == [False, True]
    assert max(checkpoints_of(run_dir)) == NUM_STEPS
