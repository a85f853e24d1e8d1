"""Commands of the pipeline in a folder, and what they leave there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.contracts.events import read_events

TIMEOUT_S = 300.0
TEACHER = ["teacher.width=4", "cluster=inprocess"]
STUDENT = [*TEACHER, "teacher.checkpoint=runs/teacher", "student=mlp", "student.hidden=[16]"]


@dataclass(frozen=True)
class Ended:
    """A command that ended."""

    code: int
    out: str
    err: str

    @property
    def last_line(self) -> str:
        return self.out.splitlines()[-1]


def spawn(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline", *arguments],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(folder: Path, *arguments: str) -> Ended:
    """A command as typed in ``folder``."""
    process = spawn(folder, *arguments)
    try:
        out, err = process.communicate(timeout=TIMEOUT_S)
    finally:
        process.kill()
    return Ended(process.returncode, out, err)


Call = Callable[..., Ended]


def read_result(run_dir: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((run_dir / "result.json").read_text())
    return result


def events_of(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    return [event.data for event, _ in read_events(run_dir / "events.jsonl") if event.kind == kind]


def mlflow_client(uri: str) -> Any:
    from pipeline.tracking.quiet import import_mlflow

    return import_mlflow().MlflowClient(uri)


def history_of(client: Any, run_id: str, metric: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in client.get_metric_history(run_id, metric)]


def wait_until(condition: Callable[[], object], explain: Callable[[], str]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, explain()
        time.sleep(0.1)  # between two polls
