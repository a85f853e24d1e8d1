"""A run that is told to stop is gone at once, says so, leaves no process behind, and is gone on with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from pipeline.contracts.events import read_events
from pipeline.data.sources.digits import DigitsParams
from pipeline.models import build_classifier
from pipeline.models.mlp import MLPParams

ROOT = Path(__file__).parents[2]
START_TIMEOUT_S = 300.0


def start(run_dir: Path, *overrides: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pipeline", "distill", *overrides]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with run_dir.with_suffix(".log").open("a") as log:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log, text=True)


def all_events(run_dir: Path) -> list[dict[str, Any]]:
    return [event.data | {"kind": event.kind} for event, _ in read_events(run_dir / "events.jsonl")]


def wait_for(condition: Callable[[], bool], run_dir: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while not condition():
        assert process.poll() is None, run_dir.with_suffix(".log").read_text()
        assert time.monotonic() < deadline, run_dir.with_suffix(".log").read_text()
        time.sleep(0.05)  # between two polls


def has_checkpoint(run_dir: Path) -> bool:
    """With Ray, one that is committed: its controller takes note of a report up to a second later."""
    if "checkpoint" not in [event["kind"] for event in all_events(run_dir)]:
        return False
    ray = run_dir / "ray"
    return not ray.exists() or any(ray.rglob("checkpoint_manager_snapshot.json"))


def make_teacher(folder: Path) -> list[str]:
    network = build_classifier(MLPParams(hidden=(16,)), DigitsParams().open().spec).network
    torch.save(network.state_dict(), folder / "teacher.pt")
    return ["teacher=mlp", "teacher.hidden=[16]", f"teacher.checkpoint={folder / 'teacher.pt'}"]


@pytest.mark.parametrize(
    ("cluster", "epochs"),
    [
        (["cluster=inprocess"], 25),
        pytest.param(["cluster=ray", "cluster.address=local"], 20, marks=[pytest.mark.slow, pytest.mark.timeout(1200)]),
    ],
    ids=["inprocess", "ray"],
)
def test_sigterm_ends_a_run_that_can_be_gone_on_with(cluster: list[str], epochs: int, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    network = ["student=mlp", "student.hidden=[16]", f"train.epochs={epochs}", f"run.dir={run_dir}"]
    process = start(run_dir, *make_teacher(tmp_path), *network, *cluster)
    wait_for(lambda: has_checkpoint(run_dir), run_dir, process)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 128 + signal.SIGTERM
    _, alive = psutil.wait_procs(children, timeout=10)
    assert alive == []

    result = json.loads((run_dir / "result.json").read_text())
    assert (result["status"], result["exit_code"]) == ("killed", 143)
    said = run_dir.with_suffix(".log").read_text().splitlines()
    assert said[-1] == str(run_dir / "result.json")
    assert said[-2] == f"go on with: python -m pipeline distill resume={run_dir}"
    # The work goes on until the process is gone, so other events may follow.
    states = [event for event in all_events(run_dir) if event["kind"] == "status"]
    assert [event["status"] for event in states] == ["running", "killed"]
    assert states[-1]["message"] == "stopped by SIGTERM"

    process = start(run_dir, f"resume={run_dir}")
    assert process.wait(timeout=START_TIMEOUT_S) == 0, run_dir.with_suffix(".log").read_text()
    assert json.loads((run_dir / "result.json").read_text())["status"] == "finished"
    events = all_events(run_dir)
    begins = [event["start_step"] for event in events if event["kind"] == "plan"]
    assert len(begins) == 2
    assert begins[1] > begins[0] == 0
    # Every epoch was evaluated; at most those after the last committed checkpoint were evaluated again.
    steps = [event["step"] for event in events if event["kind"] == "evaluation" and event["split"] == "validation"]
    assert sorted(set(steps)) == [19 * epoch for epoch in range(1, epochs + 1)]
