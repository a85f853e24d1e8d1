"""Populations on Ray; searches that are stopped or killed, and gone on with."""

from __future__ import annotations

import random
import signal
import subprocess
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipeline.cli.main import main
from pipeline.contracts.events import read_events
from pipeline.trials.records import read_trials
from tests.integration.commands import read_result, wait_until
from tests.integration.searches import WAIT_S, children, start_search

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.mark.usefixtures("ray_cluster")
def test_a_population(search_place: tuple[Path, list[str]]) -> None:
    search = search_place[0] / "population"
    options = ["search=temperature", "search.scheduler=pbt", "search.num_trials=4", "train.epochs=4"]
    confirm = ["search.confirm.top=1", "search.confirm.seeds=1"]
    assert main(["search", *search_place[1], *options, *confirm, f"run.dir={search}"]) == 0
    trials = {trial.label: trial for trial in read_trials(search) if not trial.confirms}
    states = [trial.state for trial in trials.values()]
    assert (states.count("finished"), states.count("pruned")) == (4, 3)  # one gives way at each of three pauses
    copies = [trial for trial in trials.values() if trial.copy_of]
    assert [trial.label for trial in copies] == ["0004", "0005", "0006"]
    tags = {run.data.tags["trial"]: run.data.tags for run in children(search)}
    for pause, copy in enumerate(copies, start=1):
        source = trials[copy.copy_of]
        assert copy.draw != source.draw
        assert copy.curve[0][0] == pause + 1
        events = [event for event, _ in read_events(search / "trials" / copy.label / "events.jsonl")]
        plan = next(event.data for event in events if event.kind == "plan")
        assert plan["start_step"] == pause * plan["steps_per_epoch"]
        assert tags[copy.label]["copy_of"] == source.label
    assert {tags[label]["outcome"] for label in trials} == {"finished", "pruned"}
    assert all("gave way to" in tags[label]["status_message"] for label in trials if trials[label].state == "pruned")


def test_ctrl_c_leaves_a_search_that_goes_on(search_place: tuple[Path, list[str]], tmp_path: Path) -> None:
    search = search_place[0] / "interrupted"
    options = ["search=temperature", "search.scheduler=pbt", "search.num_trials=4", "train.epochs=6"]
    confirm = ["search.confirm.top=1", "search.confirm.seeds=1", "cluster.address=local"]
    process = start_search(tmp_path, ["search", *search_place[1], *options, *confirm, f"run.dir={search}"])
    log = tmp_path / "search.log"
    wait_until(lambda: any(trial.state == "paused" for trial in read_trials(search)), log.read_text)
    started = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=WAIT_S) == 128 + signal.SIGINT
    assert psutil.wait_procs(started, timeout=WAIT_S)[1] == []
    assert f"go on with: python -m pipeline search resume={search}" in log.read_text()
    assert read_result(search)["status"] == "killed"

    process = start_search(tmp_path, ["search", f"resume={search}"])
    assert process.wait(timeout=WAIT_S) == 0, log.read_text()
    states = [trial.state for trial in read_trials(search) if not trial.confirms]
    assert (states.count("finished"), states.count("pruned")) == (4, 5)
    outcomes = {run.data.tags["trial"]: run.data.tags["outcome"] for run in children(search)}
    assert outcomes == {trial.label: trial.state for trial in read_trials(search)}
    assert {run.info.status for run in children(search)} == {"FINISHED"}


@pytest.mark.bench  # four minutes
@pytest.mark.parametrize(("scheduler", "epochs"), [("asha", 12), ("pbt", 6)])
def test_a_driver_that_is_killed_three_times(
    search_place: tuple[Path, list[str]], tmp_path: Path, scheduler: str, epochs: int
) -> None:
    """Each start has a Ray of its own, which dies with its driver."""
    search, moments = search_place[0] / f"killed-{scheduler}", random.Random(1)
    options = ["search=temperature", "search.num_trials=10", "cluster.address=local", f"train.epochs={epochs}"]
    options += [f"search.scheduler={scheduler}"]
    command = ["search", *search_place[1], *options, f"run.dir={search}"]
    finished: dict[str, Any] = {}
    log = tmp_path / "search.log"
    for number in range(3):
        process = start_search(tmp_path, command)
        begun = sum(trial.state != "waiting" for trial in read_trials(search))
        target = begun + moments.randint(1, 3)
        _wait_for_evaluated(search, target, process)
        assert process.poll() is None, log.read_text()
        process.kill()
        process.wait()
        over = {trial.label: trial for trial in read_trials(search) if trial.state in ("finished", "pruned")}
        assert finished.items() <= over.items(), number  # none was done twice
        finished = over
        command = ["search", f"resume={search}"]
    process = start_search(tmp_path, command)
    assert process.wait(timeout=WAIT_S) == 0, log.read_text()
    trials = {trial.label: trial for trial in read_trials(search)}
    assert finished.items() <= trials.items()
    drawn = [trial for trial in trials.values() if not trial.confirms and not trial.copy_of]
    assert [trial.label for trial in drawn] == [f"{number:04d}" for number in range(10)]
    assert len({str(trial.draw) for trial in drawn}) == 10
    assert sum(bool(trial.copy_of) for trial in trials.values()) == (3 * 5 if scheduler == "pbt" else 0)
    assert all(trial.is_over for trial in trials.values())
    runs = children(search)
    assert sorted(run.data.tags["trial"] for run in runs) == sorted(trials)
    assert {run.info.status for run in runs} == {"FINISHED"}


def _wait_for_evaluated(search: Path, number: int, process: subprocess.Popen[bytes]) -> None:
    """Until so many trials have been evaluated, or the search is gone."""

    def is_reached() -> bool:
        return process.poll() is not None or sum(bool(trial.curve) for trial in read_trials(search)) >= number

    wait_until(is_reached, lambda: f"fewer than {number} trials were evaluated in {search}")
