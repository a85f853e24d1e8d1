"""The tracker's runs of trials: below the search's run, with what became of each, and only once the server has it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.runs import Run, open_run
from pipeline.contracts.events import Event, Journal
from pipeline.tracking import Tracker
from pipeline.tracking.connection import Connection
from pipeline.tracking.quiet import import_mlflow
from pipeline.trials import tracking
from pipeline.trials.records import Trial, trial_folder
from pipeline.trials.tracking import TrialTrackers, list_unsent
from tests.unit.runs import build

PARENT = "f" * 32


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with MLflow's tables: making one takes seconds, copying it does not."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    Connection(f"sqlite:///{path}", path.parent)
    return path


@pytest.fixture
def search(empty_database: Path, working_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """The run of a search, which the server has."""
    monkeypatch.setattr(tracking, "_LOOK_S", 0.05)
    shutil.copy(empty_database, working_folder / "mlflow.db")
    overrides = (
        "search=temperature",
        "teacher.source=cached",
        "cache.path=cache",
        "run.dir=s",
        "tracking.uri=sqlite:///mlflow.db",
    )
    with open_run("search", build(*overrides, command="search")) as run:
        know_parent(run)
        yield run


def know_parent(run: Run) -> None:
    (run.dir / "tracking.json").write_text(json.dumps({"uri": run.config.tracking.uri, "run_id": PARENT}))


def write_trial(search: Run, label: str) -> None:
    """What a trial's process leaves while it runs."""
    folder = trial_folder(search.dir, label)
    with open_run("distill", build(f"run.dir={folder}", f"run.name=s/{label}")) as run:
        journal = Journal(run.dir / "events.jsonl")
    journal.emit(Event("status", {"status": "running", "message": ""}))
    journal.emit(Event("evaluation", {"split": "validation", "step": 10, "epoch": 1, "metrics": {"val/top1": 0.5}}))


def find_children(search: Run) -> dict[str, Any]:
    client = import_mlflow().MlflowClient(tracking_uri=search.config.tracking.uri)
    experiment = client.get_experiment_by_name(search.config.tracking.experiment)
    runs = client.search_runs([experiment.experiment_id]) if experiment else []
    return {run.info.run_name: run for run in runs}


def test_each_trial_has_a_run_below_the_search(search: Run) -> None:
    trackers = TrialTrackers(search, {})
    ended = [
        Trial("0000", {}, state="finished", value=0.5),
        Trial("0001", {}, state="pruned", value=0.5, curve=((1, 0.4), (2, 0.5))),
        Trial("0002", {}, state="failed", message="loss: it is not finite"),
    ]
    for trial in ended:
        write_trial(search, trial.label)
        trackers.follow(trial)
        trackers.follow(trial)
        trackers.end(trial)
    assert trackers.close() == ""

    children = find_children(search)
    assert sorted(children) == ["s/0000", "s/0001", "s/0002"]
    found = {
        name: (run.info.status, run.data.tags["outcome"], run.data.tags.get("status_message"))
        for name, run in children.items()
    }
    assert found == {
        "s/0000": ("FINISHED", "finished", "finished"),
        "s/0001": ("FINISHED", "pruned", "stopped early after 2 epochs"),
        "s/0002": ("FAILED", "failed", "loss: it is not finite"),
    }
    for name, run in children.items():
        assert run.data.tags["mlflow.parentRunId"] == PARENT
        assert run.data.tags["trial"] == name.removeprefix("s/")
        assert run.data.tags["command"] == "distill"
        assert run.data.metrics["val/top1"] == 0.5
        assert run.data.params["loss.name"] == "kd"
    assert list_unsent(search, ended) == []


def test_nothing_is_sent_before_the_server_has_the_search(search: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("nothing is known of the search")

    trial = Trial("0000", {}, copy_of="0003")
    (search.dir / "tracking.json").unlink()
    write_trial(search, "0000")
    with monkeypatch.context() as patch:
        patch.setattr(Tracker, "open", refuse)
        trackers = TrialTrackers(search, {})
        trackers.follow(trial)
        trackers.end(Trial("0000", {}, state="finished", value=0.5))
        problem = trackers.close()
    assert problem == "not all of 1 trials was sent (the first: 0000: the server does not have the search yet)"
    assert list_unsent(search, [trial]) == [trial]

    know_parent(search)
    later = TrialTrackers(search, {})
    later.follow(trial)
    assert later.close() == ""
    assert list_unsent(search, [trial]) == []
    assert find_children(search)["s/0000"].data.tags["copy_of"] == "0003"


def test_a_killed_search_records_what_ran(search: Run) -> None:
    trackers = TrialTrackers(search, {})
    for label in ("0000", "0001"):
        write_trial(search, label)
        trackers.follow(Trial(label, {}))
    while len(trackers._trackers) < 2:
        trackers._stopped.wait(0.01)
    trackers.end(Trial("0000", {}, state="finished", value=0.5))
    trackers.kill()
    assert trackers.close() == ""
    assert {name: run.info.status for name, run in find_children(search).items()} == {
        "s/0000": "FINISHED",
        "s/0001": "KILLED",
    }


def test_a_trial_that_left_nothing_has_no_run(search: Run) -> None:
    trackers = TrialTrackers(search, {})
    trackers.follow(Trial("0000", {}))
    trackers.end(Trial("0000", {}, state="failed", message="its process died"))
    assert trackers.close() == ""
    assert not trial_folder(search.dir, "0000").exists()
