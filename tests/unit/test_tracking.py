"""The tracker: what it sends, that it sends it once, and what it does when nobody answers."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.contracts.columns import InputSpec
from pipeline.contracts.events import Event, Journal
from pipeline.tracking import Tracker, client
from pipeline.tracking.batches import MAX_POINTS
from pipeline.tracking.connection import Connection

TIMEOUT_S = 60.0
START = 1_700_000_000.0


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with MLflow's tables: making one takes seconds, copying it does not."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    Connection(f"sqlite:///{path}", path.parent)
    return path


@pytest.fixture
def uri(empty_database: Path, tmp_path: Path) -> str:
    (tmp_path / "tracking").mkdir()
    return f"sqlite:///{shutil.copy(empty_database, tmp_path / 'tracking' / 'mlflow.db')}"


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


def open_tracker(uri: str, run_dir: Path, **changes: Any) -> Tracker:
    values: dict[str, Any] = {
        "required": True,
        "params": {"train": {"epochs": 3, "lr": 0.1}, "loss": {"name": "kd"}, "tags": [1, None]},
        "tags": {"command": "distill"},
        "dataset": {"name": "digits", "fingerprint": "abcdef0123456789", "num_rows": 1437, "path": "digits"},
    }
    return Tracker.open(uri, "an experiment", run_dir, "digits/kd/s0", **(values | changes))


def send(uri: str, run_dir: Path, **changes: Any) -> Tracker:
    """Opens a tracker, waits until it has sent everything, and closes it."""
    tracker = open_tracker(uri, run_dir, **changes)
    assert tracker.close(TIMEOUT_S), tracker.problem
    return tracker


def mlflow_client(uri: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def step_event(step: int, time: float | None = None, loss: float | None = None) -> Event:
    metrics = {"train/loss": 1 / (step + 1) if loss is None else loss}
    data = {"step": step, "epoch": 0, "samples": 8 * step, "metrics": metrics, "samples_per_s": 100.0, "data_wait": 0.1}
    return Event("step", data, time=START + (step if time is None else time))


def history(uri: str, tracker: Tracker, key: str) -> list[tuple[int, float]]:
    points = mlflow_client(uri).get_metric_history(tracker.run_id, key)
    return sorted((point.step, point.value) for point in points)


def test_whole_record_arrives(uri: str, run_dir: Path) -> None:
    journal = Journal(run_dir / "events.jsonl")
    journal.emit(Event("status", {"status": "running", "message": ""}))
    journal.emit(Event("stage", {"name": "training", "state": "started"}))
    journal.emit(Event("plan", {"num_epochs": 3, "num_steps": 30}))
    for step in (10, 20):
        journal.emit(step_event(step))
    journal.emit(Event("pool", {"actor": "a", "rows": 64, "rows_per_s": 32.0, "busy": 0.5}, time=START))
    journal.emit(Event("system", {"process": "rank0", "rss_bytes": 1024, "cpu_s": 1.5}, time=START))
    metrics = {"val/top1": 0.75, "val/nll": float("nan")}
    per_class = {"cat/dog": 0.5, "none": float("nan")}
    evaluation = {
        "split": "validation",
        "step": 20,
        "epoch": 2,
        "metrics": metrics,
        "per_class": per_class,
        "best": True,
    }
    journal.emit(Event("evaluation", evaluation, time=START))
    journal.emit(Event("checkpoint", {"step": 20, "best": True}))
    journal.emit(Event("warning", {"message": "a first one"}, time=START))
    (run_dir / "config.yaml").write_text("seed: 0\n")
    journal.emit(Event("artifact", {"path": str(run_dir / "config.yaml"), "folder": "run"}))
    journal.emit(Event("artifact", {"path": "never-written.txt", "folder": "run"}))
    journal.emit(Event("warning", {"message": "a second one"}, time=START + 1))
    journal.emit(Event("status", {"status": "finished"}, time=START + 60))
    tracker = send(uri, run_dir)

    mlflow = mlflow_client(uri)
    run = mlflow.get_run(tracker.run_id)
    assert (run.info.run_name, run.info.status) == ("digits/kd/s0", "FINISHED")
    assert run.info.end_time == (START + 60) * 1000
    assert mlflow.get_experiment(run.info.experiment_id).name == "an experiment"
    assert run.data.params == {"train.epochs": "3", "train.lr": "0.1", "loss.name": "kd", "tags": "[1, null]"}
    expected_tags = {
        "command": "distill", "run_dir": str(run_dir), "plan.num_steps": "30",
        "last_checkpoint_step": "20", "best_step": "20", "last_warning": "a second one",
    }  # fmt: skip
    assert expected_tags.items() <= run.data.tags.items()
    (data,) = run.inputs.dataset_inputs
    assert (data.dataset.name, data.dataset.digest) == ("digits", "abcdef0123456789")

    assert history(uri, tracker, "train/loss") == [(10, 1 / 11), (20, 1 / 21)]
    assert history(uri, tracker, "train/samples_per_s") == [(10, 100.0), (20, 100.0)]
    assert history(uri, tracker, "val/top1") == [(20, 0.75)]
    assert history(uri, tracker, "val_by_epoch/top1") == [(2, 0.75)]
    assert np.isnan(history(uri, tracker, "val/nll")[0][1])
    assert history(uri, tracker, "system/pool/busy") == [(20, 0.5)]
    assert history(uri, tracker, "system/rank0/rss_bytes") == [(20, 1024.0)]
    (point,) = mlflow.get_metric_history(tracker.run_id, "val/top1")
    assert point.timestamp == START * 1000

    artifacts = Path(mlflow.download_artifacts(tracker.run_id, ""))
    assert artifacts.is_relative_to(run_dir.parent / "tracking")
    assert (artifacts / "run" / "config.yaml").read_text() == "seed: 0\n"
    assert (artifacts / "warnings.txt").read_text().splitlines() == [
        "2023-11-14 22:13:20 UTC a first one",
        "2023-11-14 22:13:21 UTC a second one",
    ]
    table = json.loads((artifacts / "per_class" / "validation" / "step_00000020.json").read_text())
    assert table == {"cat/dog": 0.5, "none": None}


def test_journal_is_followed_while_it_grows(uri: str, run_dir: Path) -> None:
    tracker = open_tracker(uri, run_dir)
    journal = Journal(run_dir / "events.jsonl")
    assert tracker.flush(TIMEOUT_S)  # nothing to send yet, but the run is there
    assert tracker.run_id
    for step in range(5):
        journal.emit(step_event(step))
        assert tracker.flush(TIMEOUT_S), tracker.problem
        assert len(history(uri, tracker, "train/loss")) == step + 1
        assert json.loads((run_dir / "tracking.json").read_text())["offset"] == journal.path.stat().st_size
    assert tracker.close(TIMEOUT_S)


def test_more_points_than_fit_one_request(uri: str, run_dir: Path) -> None:
    journal = Journal(run_dir / "events.jsonl")
    for step in range(MAX_POINTS // 3 * 2):
        journal.emit(step_event(step))
    tracker = send(uri, run_dir)
    assert [step for step, _ in history(uri, tracker, "train/loss")] == list(range(MAX_POINTS // 3 * 2))


def test_resumed_run_goes_on_without_duplicates(uri: str, run_dir: Path) -> None:
    journal = Journal(run_dir / "events.jsonl")
    for step in range(10):
        journal.emit(step_event(step))
    journal.emit(Event("warning", {"message": "before"}))
    journal.emit(Event("status", {"status": "killed", "message": "stopped by signal 15"}))
    first = send(uri, run_dir)
    assert mlflow_client(uri).get_run(first.run_id).info.status == "KILLED"

    journal.emit(Event("status", {"status": "running"}))
    journal.emit(Event("warning", {"message": "after"}))
    for step in range(6, 15):  # its checkpoint was at step 5; the clock went on
        journal.emit(step_event(step, time=100.0 + step))
    second = send(uri, run_dir, params={"train": {"epochs": 5, "lr": 0.1}, "new": True})
    run = mlflow_client(uri).get_run(second.run_id)
    assert second.run_id == first.run_id
    assert run.info.status == "RUNNING"
    assert run.data.params["train.epochs"] == "3"  # cannot be changed in MLflow
    assert run.data.tags["resumed.train.epochs"] == "5"
    assert run.data.params["new"] == "true"
    assert history(uri, second, "train/loss") == [(step, 1 / (step + 1)) for step in range(15)]
    warnings = Path(mlflow_client(uri).download_artifacts(second.run_id, "warnings.txt")).read_text()
    assert [line.split()[-1] for line in warnings.splitlines()] == ["before", "after"]


def test_batch_sent_twice_counts_once(uri: str, run_dir: Path) -> None:
    """The server took a batch, but the driver died before it stored how far it was."""
    journal = Journal(run_dir / "events.jsonl")
    for step in range(20):
        journal.emit(step_event(step))
    journal.emit(Event("system", {"process": "driver", "rss_bytes": 5, "cpu_s": 1.0}))
    first = send(uri, run_dir)
    stored = json.loads((run_dir / "tracking.json").read_text())
    journal.emit(step_event(20))
    (run_dir / "tracking.json").write_text(json.dumps(stored | {"offset": 0, "sent_steps": {}, "step": 0}))
    second = send(uri, run_dir)
    assert second.run_id == first.run_id
    assert len(history(uri, second, "train/loss")) == 21
    assert len(history(uri, second, "system/driver/cpu_s")) == 1


def test_run_whose_id_was_never_stored_is_found_again(uri: str, run_dir: Path) -> None:
    first = send(uri, run_dir)
    stored = json.loads((run_dir / "tracking.json").read_text())
    (run_dir / "tracking.json").write_text(json.dumps(stored | {"run_id": None}))
    second = send(uri, run_dir)
    assert second.run_id == first.run_id


def test_server_lost_just_after_it_created_the_run_has_no_second_one(
    uri: str, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose(*_: Any) -> None:
        raise ConnectionError("the server is gone")

    Journal(run_dir / "events.jsonl").emit(step_event(10))
    with monkeypatch.context() as patched:
        patched.setattr(Connection, "_complete_params", lose)
        tracker = open_tracker(uri, run_dir)
        assert not tracker.close(5.0)
        assert "the server is gone" in str(tracker.problem)
    tracker = send(uri, run_dir)
    client = mlflow_client(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("an experiment").experiment_id])
    assert run.info.run_id == tracker.run_id
    assert run.data.tags["command"] == "distill"


@pytest.mark.parametrize("how", ["deleted on the server", "another server"])
def test_whole_record_goes_to_a_new_run_where_there_is_none(
    how: str, uri: str, run_dir: Path, empty_database: Path
) -> None:
    journal = Journal(run_dir / "events.jsonl")
    journal.emit(step_event(1))
    first = send(uri, run_dir)
    journal.emit(step_event(2))
    if how == "another server":
        uri = f"sqlite:///{shutil.copy(empty_database, run_dir / 'other.db')}"
    else:
        mlflow_client(uri).delete_run(first.run_id)
    second = send(uri, run_dir)
    assert second.run_id != first.run_id
    assert [step for step, _ in history(uri, second, "train/loss")] == [1, 2]


@pytest.mark.parametrize(
    ("status", "expected"),
    [("running", "RUNNING"), ("finished", "FINISHED"), ("failed", "FAILED"), ("killed", "KILLED")],
)
def test_status_of_the_run(status: str, expected: str, uri: str, run_dir: Path) -> None:
    Journal(run_dir / "events.jsonl").emit(Event("status", {"status": status, "message": "a reason"}))
    run = mlflow_client(uri).get_run(send(uri, run_dir, parent_run_id="f" * 32).run_id)
    assert run.info.status == expected
    assert run.data.tags["status_message"] == "a reason"
    assert run.data.tags["mlflow.parentRunId"] == "f" * 32


def test_a_run_that_was_gone_on_with_does_not_say_what_it_failed_of(uri: str, run_dir: Path) -> None:
    journal = Journal(run_dir / "events.jsonl")
    journal.emit(Event("status", {"status": "failed", "message": "the disk is full"}))
    sent = send(uri, run_dir)
    for status in ("running", "finished"):
        journal.emit(Event("status", {"status": status, "message": ""}))
    assert send(uri, run_dir).run_id == sent.run_id
    run = mlflow_client(uri).get_run(sent.run_id)
    assert (run.info.status, run.data.tags["status_message"]) == ("FINISHED", "finished")


def test_model_can_be_loaded_and_asked(uri: str, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from pipeline.models import MODELS, ModelCard, build_classifier, save_model

    spec = InputSpec("image", (1, 8, 8), ("a", "b", "c"))
    params = MODELS.get("small_cnn").model_validate({"name": "small_cnn", "width": 4})
    torch.manual_seed(0)
    classifier = build_classifier(params, spec).eval()
    save_model(run_dir / "model", classifier, ModelCard.describe(params, classifier, {}, "data"))
    journal = Journal(run_dir / "events.jsonl")
    journal.emit(step_event(7))
    for _ in range(2):  # journalled again by a driver that died right after the first time
        journal.emit(Event("model", {"path": str(run_dir / "model")}))
    tracker = send(uri, run_dir)

    import mlflow.pyfunc

    monkeypatch.setattr(sys, "path", sys.path)  # loading puts the model's own code in front
    (output,) = mlflow_client(uri).get_run(tracker.run_id).outputs.model_outputs
    model = mlflow_client(uri).get_logged_model(output.model_id)
    assert (model.status, output.step) == ("READY", 7)
    loaded = mlflow.pyfunc.load_model(model.artifact_location)
    inputs = np.random.default_rng(0).integers(0, 256, (5, 1, 8, 8), dtype=np.uint8)
    probabilities = loaded.predict(inputs)
    with torch.inference_mode():
        expected = classifier(torch.from_numpy(inputs)).softmax(-1).numpy()
    np.testing.assert_allclose(probabilities, expected, rtol=1e-6)
    schema = loaded.metadata.signature
    assert [(tensor.type, tensor.shape) for tensor in schema.inputs] == [(np.uint8, (-1, 1, 8, 8))]
    assert [(tensor.type, tensor.shape) for tensor in schema.outputs] == [(np.float32, (-1, 3))]
    with pytest.raises(mlflow.MlflowException, match="shape"):
        loaded.predict(inputs[:, :, :4])
    stored = Path(model.artifact_location.removeprefix("file://"))
    assert not [path for path in stored.rglob("*") if path.suffix in (".pkl", ".pyc")]
    assert (stored / "code" / "pipeline" / "tracking" / "served.py").exists()


def test_store_that_takes_no_files_holds_up_no_metrics(
    uri: str, run_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError("no bucket for you")

    monkeypatch.setattr(Connection, "upload", refuse)
    monkeypatch.setattr(client, "_FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(client, "_LONGEST_WAIT_S", 0.001)
    journal = Journal(run_dir / "events.jsonl")
    journal.emit(Event("artifact", {"path": "events.jsonl", "folder": ""}))
    journal.emit(step_event(1))
    tracker = open_tracker(uri, run_dir)
    assert not tracker.close(TIMEOUT_S)  # says that something is missing
    assert history(uri, tracker, "train/loss") == [(1, 0.5)]
    assert "no bucket for you" in caplog.text
    assert "no bucket for you" in str(tracker.problem)


def test_a_refused_metric_holds_up_no_others(uri: str, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.tracking.batches.clean_key", lambda name: name)
    journal = Journal(run_dir / "events.jsonl")
    data = {"step": 1, "metrics": {"train/loss": 0.5, "what?": 1.0, "train/lr": 0.1}}
    journal.emit(Event("step", data))
    tracker = send(uri, run_dir)
    assert set(mlflow_client(uri).get_run(tracker.run_id).data.metrics) == {"train/loss", "train/lr"}


def test_nothing_of_the_environment_is_kept_or_changed(
    uri: str, run_dir: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    secret = "s3cr3t-token"
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", secret)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", secret)
    before = dict(os.environ)
    Journal(run_dir / "events.jsonl").emit(Event("status", {"status": "finished"}))
    send(uri, run_dir)
    assert dict(os.environ) == before
    files = [path for path in run_dir.parent.rglob("*") if path.is_file()]
    assert not [path for path in files if secret.encode() in path.read_bytes()]
    assert capfd.readouterr() == ("", "")
