"""A search on Ray, from the cache to the winner; one whose trial loses its process."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import threading
import time
import urllib.parse
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from pipeline.cli.main import main
from pipeline.config.results import read_run_id
from pipeline.contracts.events import read_events
from pipeline.trials.records import read_trials
from tests.integration.commands import events_of, mlflow_client, read_result, wait_until
from tests.integration.conftest import FAKE_ACCELERATOR
from tests.integration.mlflow_server import Server
from tests.integration.searches import CONFIRM, ROWS, WAIT_S, children, prepare

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "model" / "model.safetensors")


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.usefixtures("ray_cluster")
def test_from_the_cache_to_the_winner(tmp_path: Path) -> None:
    import ray

    before = ray.available_resources()
    search = tmp_path / "search"
    options = ["search=temperature", "search.searcher=random", "search.num_trials=6", f"run.dir={search}"]
    assert main(["search", *prepare(tmp_path), *CONFIRM, *options]) == 0
    result = read_result(search)
    trials = {trial.label: trial for trial in read_trials(search)}
    own = [trial for trial in trials.values() if not trial.confirms]

    # One pass of the teacher, whatever the number of trials.
    assert result["metrics"]["teacher/rows_forwarded"] == result["metrics"]["teacher/rows_computed"] == ROWS
    assert [trial.label for trial in own] == [f"{number:04d}" for number in range(6)]
    assert own[0].draw == {"loss.temperature": 4.0, "loss.kd_weight": 0.9}
    assert {trial.state for trial in own} <= {"finished", "pruned"}
    assert len(trials) - len(own) in (4, 6)  # the defaults may be among the best
    stages = [event["detail"] for event in events_of(search, "stage") if event["name"] == "evaluation"]
    assert sum(detail.startswith("test,") for detail in stages) == 1

    # What was placed is free again.
    deadline = time.monotonic() + WAIT_S
    while ray.available_resources().get("CPU") != before.get("CPU"):
        assert time.monotonic() < deadline, ray.available_resources()
        time.sleep(0.2)  # between two polls

    # A trial is nothing but a run of distill, and the winner's choice trains it again.
    winner, seed = result["winner"], 2
    repeated = search / "trials" / f"{winner}-s{seed}"
    again = ["--conf", str(search / "winner" / "conf"), "experiment=winner", "cluster=inprocess", f"run.seed={seed}"]
    assert (
        main(["distill", *again, "train.num_threads=1", f"run.dir={tmp_path / 'again'}", "evaluation.test=false"]) == 0
    )
    assert equal(weights(repeated), weights(tmp_path / "again"))
    assert equal(weights(Path(result["winner_run"])), weights(search))

    # Extended: what is over stays.
    assert main(["search", f"resume={search}", "search.num_trials=+2"]) == 0
    extended = {trial.label: trial for trial in read_trials(search)}
    assert {label: extended[label] for label in trials} == trials
    assert sum(not trial.confirms for trial in extended.values()) == 8
    assert read_result(search)["metrics"]["teacher/rows_computed"] == ROWS

    runs = {run.data.tags["trial"]: run for run in children(search)}
    assert runs.keys() == extended.keys()
    for label, trial in extended.items():
        run = runs[label]
        assert (run.info.status, run.data.tags["outcome"]) == ("FINISHED", trial.state)
        assert run.data.params["loss.temperature"]
        assert "val/top1" in run.data.metrics


@pytest.fixture(scope="module")
def failing(search_place: tuple[Path, list[str]], ray_cluster: None) -> Path:
    """A search over a grid of learning rates, with one that is far too high."""
    folder, overrides = search_place
    space = folder / "rates.yaml"
    rates = "[0.05, 1.0e+30, 0.02, 0.01]"
    space.write_text(f"space: {{train: {{optimizer: {{lr: {{distribution: choice, options: {rates}}}}}}}}}")
    grid = ["search.searcher=grid", "search.scheduler=none", f"search={space}", f"run.dir={folder / 'failing'}"]
    assert main(["search", *overrides, *grid]) == 0
    return folder / "failing"


def test_a_trial_that_fails_is_left_behind(failing: Path) -> None:
    trials = {trial.label: trial for trial in read_trials(failing)}
    assert [trials[f"{number:04d}"].state for number in range(4)] == ["finished", "failed", "finished", "finished"]
    failed = trials["0001"]
    assert failed.retries == 0  # it would fail of the same again
    assert "became" in failed.message
    (run,) = (run for run in children(failing) if run.data.tags["trial"] == "0001")
    assert (run.info.status, run.data.tags["status_message"]) == ("FAILED", failed.message)


def test_the_pages_of_a_search(failing: Path) -> None:
    """MLflow's pages in a browser: the search, one of its trials, its charts, two trials beside each other."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("there is no Chromium on this machine")
    runs = {run.data.tags["trial"]: run.info for run in children(failing)}
    experiment, parent = runs["0000"].experiment_id, read_run_id(failing)
    ids = [runs[label].run_id for label in ("0000", "0002")]
    query = urllib.parse.urlencode({"runs": json.dumps(ids), "experiments": json.dumps([experiment])})
    wanted = {
        f"experiments/{experiment}/runs/{parent}": ["0000", "0003", "over 2 fresh seeds", "winner/val/top1"],
        f"experiments/{experiment}/runs/{runs['0001'].run_id}": ["Failed", "train.optimizer.lr", "became"],
        f"experiments/{experiment}/runs/{parent}/artifacts/search/charts.html": ["charts.html", "trials.csv"],
        f"compare-runs?{query}": ["0000", "0002", "train.optimizer.lr", "val/top1"],
    }
    server = Server(failing.parent)
    server.start()
    try:
        for path, texts in wanted.items():
            page = _open(browser, f"{server.uri}/#/{path}", failing.parent / "browser")
            assert [text for text in texts if text not in page] == [], path
    finally:
        server.kill()


@pytest.mark.usefixtures("ray_cluster")
def test_a_search_whose_tracking_server_goes_away(
    search_place: tuple[Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It comes to its end without, and what the server lacks is sent by the next look at the search."""
    search, server = tmp_path / "search", Server(tmp_path)
    server.start()

    def kill_server() -> None:
        wait_until(lambda: any(trial.curve for trial in read_trials(search)), lambda: "no trial began")
        server.kill()

    thread = threading.Thread(target=kill_server)
    thread.start()
    options = ["search=temperature", "search.num_trials=3", "search.scheduler=none", f"tracking.uri={server.uri}"]
    confirm = ["search.confirm.top=1", "search.confirm.seeds=1"]
    try:
        assert main(["search", *search_place[1], *options, *confirm, f"run.dir={search}"]) == 0
        thread.join()
        assert read_result(search)["status"] == "finished"
        assert "not everything was sent" in capsys.readouterr().out
        server.start()
        assert main(["search", f"resume={search}"]) == 0
        runs = children(search, mlflow_client(server.uri))
    finally:
        server.kill()
    trials = read_trials(search)
    assert sorted(run.data.tags["trial"] for run in runs) == sorted(trial.label for trial in trials)
    assert {(run.info.status, run.data.tags["outcome"]) for run in runs} == {("FINISHED", "finished")}
    assert {run.data.metrics["val/top1"] for run in runs} == {trial.curve[-1][1] for trial in trials}


def _open(browser: str, address: str, profile: Path) -> str:
    """What a page holds once its scripts have run."""
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
    command = [browser, *options, "--virtual-time-budget=20000", "--dump-dom", address]
    return subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, check=True).stdout


@pytest.mark.usefixtures("ray_cluster")
def test_too_many_failures_end_the_search(
    search_place: tuple[Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    search = search_place[0] / "failed"
    space = tmp_path / "rates.yaml"
    space.write_text("space: {train: {optimizer: {lr: {distribution: uniform, low: 1.0e+30, high: 2.0e+30}}}}")
    overrides = [f"search={space}", "search.num_trials=6", "search.searcher=random", f"run.dir={search}"]
    assert main(["search", *search_place[1], *overrides]) == 1
    assert "of 6 trials failed, which ends the search" in capsys.readouterr().err
    assert read_result(search)["status"] == "failed"
    assert sum(trial.state == "failed" for trial in read_trials(search)) in (2, 3)


@pytest.mark.usefixtures("ray_cluster")
def test_a_trial_whose_process_is_lost_goes_on(search_place: tuple[Path, list[str]]) -> None:
    search = search_place[0] / "lost"
    killed: list[int] = []

    def kill_one() -> None:
        deadline = time.monotonic() + WAIT_S
        while not killed and time.monotonic() < deadline:
            for trial in read_trials(search):
                if trial.state == "running" and len(trial.curve) > 1:
                    status = json.loads((search / "trials" / trial.label / "status.json").read_text())
                    os.kill(status["pid"], signal.SIGKILL)
                    killed.append(status["pid"])
                    return
            time.sleep(0.02)  # between two polls

    thread = threading.Thread(target=kill_one)
    thread.start()
    options = ["search=temperature", "search.num_trials=2", "search.scheduler=none", "train.epochs=40"]
    assert main(["search", *search_place[1], *options, "search.confirm.top=1", f"run.dir={search}"]) == 0
    thread.join()
    assert killed
    trials = read_trials(search)
    assert sum(trial.retries for trial in trials) == 1
    assert {trial.state for trial in trials} == {"finished"}
    (lost,) = (trial for trial in trials if trial.retries)
    events = [event for event, _ in read_events(search / "trials" / lost.label / "events.jsonl")]
    starts = [event.data["start_step"] for event in events if event.kind == "plan"]
    assert len(starts) == 2
    assert starts[1] > starts[0] == 0
    assert [epoch for epoch, _ in lost.curve] == list(range(1, 41))


@pytest.mark.usefixtures("ray_cluster")
def test_trials_of_two_workers(search_place: tuple[Path, list[str]], tmp_path: Path) -> None:
    """There is room for one at a time: what is stopped early, or loses a worker, gives back what it held."""
    search = search_place[0] / "two-workers"
    space = tmp_path / "rates.yaml"
    rates = "[0.05, 1.0e-6, 2.0e-6, 3.0e-6]"
    space.write_text(f"space: {{train: {{optimizer: {{lr: {{distribution: choice, options: {rates}}}}}}}}}")
    killed: list[int] = []

    def kill_one() -> None:
        deadline = time.monotonic() + WAIT_S
        while not killed and time.monotonic() < deadline:
            if any(trial.state == "running" and len(trial.curve) > 1 for trial in read_trials(search)):
                (member,) = (child for child in psutil.Process().children(recursive=True) if _is_member(child))
                member.kill()
                killed.append(member.pid)
            time.sleep(0.02)  # between two polls

    thread = threading.Thread(target=kill_one)
    thread.start()
    options = [
        "search.searcher=grid",
        "cluster.num_workers=2",
        f"cluster.resources_per_worker={{{FAKE_ACCELERATOR}:2}}",
    ]
    confirm = ["search.confirm.top=1", "search.confirm.seeds=1", "train.epochs=30", "train.num_threads=1"]
    assert main(["search", *search_place[1], f"search={space}", *options, *confirm, f"run.dir={search}"]) == 0
    thread.join()
    assert killed

    trials = {trial.label: trial for trial in read_trials(search)}
    assert sum(trial.retries for trial in trials.values()) == 1
    assert [trials[f"{number:04d}"].state for number in range(4)] == ["finished", "pruned", "pruned", "pruned"]

    # Two workers with a block each take the steps of one with two blocks.
    alone = [
        "distill",
        *search_place[1][: -len(CONFIRM)],
        "teacher.source=cached",
        "cluster=inprocess",
        "train.epochs=30",
    ]
    assert main([*alone, "train.blocks_per_step=2", "evaluation.test=false", f"run.dir={tmp_path / 'alone'}"]) == 0
    expected, found = weights(tmp_path / "alone"), weights(search / "trials" / "0000")
    assert all(torch.allclose(found[name], expected[name], atol=1e-5) for name in expected)


def _is_member(process: psutil.Process) -> bool:
    try:
        return process.name().startswith("ray::_Member")
    except psutil.NoSuchProcess:
        return False
