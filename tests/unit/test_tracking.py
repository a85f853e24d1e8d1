"""The tracker: what it sends, that it sends it once, and what it does when nobody answers."""

from __future__ import annotations

import http.server
import json
import os
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.contracts.columns import InputSpec
from pipeline.contracts.events import Event, Journal
from pipeline.errors import TrackingError
from pipeline.tracking import Tracker, client
from pipeline.tracking.address import check_reachable, check_uri, strip_credentials
from pipeline.tracking.batches import MAX_POINTS, clean_key, collect, flatten, read_journal
from pipeline.tracking.connection import Connection
from pipeline.tracking.progress import Progress

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
        "command": "distill", "run_dir": str(run_dir), "stage": "training", "plan.num_steps": "30",
        "last_checkpoint_step": "20", "best_step": "20", "last_warning": "a second one",
    }  # fmt: skip
    assert expected_tags.items() <= run.data.tags.items()
    (data,) = run.inputs.dataset_inputs
    assert (data.dataset.name, data.dataset.digest) == ("digits", "abcdef0123456789")

    assert history(uri, tracker, "train/loss") == [(10, 1 / 11), (20, 1 / 21)]
    assert history(uri, tracker, "train/samples_per_s") == [(10, 100.0), (20, 100.0)]
    assert history(uri, tracker, "val/top1") == [(20, 0.75)]
    assert history(uri, tracker, "epoch/val/top1") == [(2, 0.75)]
    assert np.isnan(history(uri, tracker, "val/nll")[0][1])
    assert history(uri, tracker, "system/pool/a/busy") == [(20, 0.5)]
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


# ---- nobody answers, or somebody else


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def web_server(answer: Callable[[http.server.BaseHTTPRequestHandler], None]) -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer(self)

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def reply_with(status: int, body: str, headers: dict[str, str] | None = None) -> Any:
    def answer(request: http.server.BaseHTTPRequestHandler) -> None:
        request.send_response(status)
        for name, value in (headers or {}).items():
            request.send_header(name, value)
        request.end_headers()
        request.wfile.write(body.encode())

    return answer


def test_server_that_is_away_is_an_error_if_required(run_dir: Path) -> None:
    address = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(TrackingError, match=r"cannot be reached .*refused.*tracking\.required=false") as caught:
        open_tracker(address, run_dir)
    assert address in str(caught.value)
    assert not list(run_dir.iterdir())


def test_server_that_is_away_is_waited_for_if_not_required(run_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    Journal(run_dir / "events.jsonl").emit(step_event(1))
    tracker = open_tracker(f"http://127.0.0.1:{free_port()}", run_dir, required=False)
    assert "goes on without its tracking server" in caplog.text
    assert not tracker.flush(0.05)
    assert tracker.problem and "cannot be reached" in tracker.problem
    assert tracker.run_id is None
    started = time.monotonic()
    assert not tracker.close(0.05)
    assert time.monotonic() - started < 2


@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        (200, "<html>welcome</html>", "is not an MLflow tracking server"),
        (200, '{"experiment": 3}', "is not an MLflow tracking server"),
        (404, "<html>no such page</html>", "is not an MLflow tracking server"),
        (401, "You are not authenticated", r"refused access \(HTTP 401: You are not authenticated\).*MLFLOW_TRACKING_TOKEN"),
        (503, "later", "answers with HTTP 503"),
        (200, '{"experiment": {"lifecycle_stage": "deleted"}}', "'an experiment' .*was deleted"),
    ],
)  # fmt: skip
def test_answers_that_are_not_good_enough(status: int, body: str, expected: str, run_dir: Path) -> None:
    with web_server(reply_with(status, body)) as address, pytest.raises(TrackingError, match=expected):
        open_tracker(address, run_dir)


@pytest.mark.parametrize(
    ("status", "body"),
    [(200, '{"experiment": {"lifecycle_stage": "active"}}'), (404, '{"error_code": "RESOURCE_DOES_NOT_EXIST"}')],
)
def test_answers_of_mlflow(status: int, body: str) -> None:
    with web_server(reply_with(status, body)) as address:
        check_reachable(address, "an experiment")


def test_server_that_accepts_and_says_nothing() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        started = time.monotonic()
        with pytest.raises(TrackingError, match="cannot be reached .*timed out"):
            check_reachable(f"http://127.0.0.1:{silent.getsockname()[1]}", "an experiment", timeout_s=0.1)
        assert time.monotonic() - started < 2


def test_token_is_sent_but_not_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "abc")
    seen: dict[str, str | None] = {}

    def elsewhere(request: http.server.BaseHTTPRequestHandler) -> None:
        seen["elsewhere"] = request.headers["Authorization"]
        reply_with(200, "")(request)

    with web_server(elsewhere) as other:

        def redirect(request: http.server.BaseHTTPRequestHandler) -> None:
            seen["server"] = request.headers["Authorization"]
            reply_with(302, "", {"Location": other})(request)

        with web_server(redirect) as address, pytest.raises(TrackingError, match="not an MLflow"):
            check_reachable(address, "an experiment")
    assert seen == {"server": "Bearer abc", "elsewhere": None}


@pytest.mark.parametrize(
    "uri", ["", "mlruns", "file:///tmp/mlruns", "sqlite:///", "postgresql://me:s3cr3t@host/db", "databricks"]
)
def test_addresses_that_cannot_be_used(uri: str) -> None:
    with pytest.raises(TrackingError, match=r"expected http://HOST:PORT") as caught:
        check_uri(uri)
    assert "s3cr3t" not in str(caught.value)


def test_password_in_an_address_is_refused_and_not_repeated(run_dir: Path) -> None:
    with pytest.raises(TrackingError, match="MLFLOW_TRACKING_PASSWORD") as caught:
        open_tracker("https://me:s3cr3t@mlflow.example.org:5000/base", run_dir, required=False)
    assert "s3cr3t" not in str(caught.value)
    assert "https://mlflow.example.org:5000/base" in str(caught.value)


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("https://me:pass@host:5000/base?token=x", "https://host:5000/base"),
        ("http://host", "http://host"),
        ("sqlite:////data/mlflow.db?key=x", "sqlite:////data/mlflow.db"),
    ],
)
def test_credentials_are_stripped(uri: str, expected: str) -> None:
    assert strip_credentials(uri) == expected


def test_databases_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("this is no database, and long enough to be seen as none" * 10)
    with pytest.raises(TrackingError, match="not a usable SQLite database"):
        check_reachable(f"sqlite:///{tmp_path}/file", "an experiment")
    with pytest.raises(TrackingError, match="folder of the tracking database .* cannot be made"):
        check_reachable(f"sqlite:///{tmp_path}/file/mlflow.db", "an experiment")
    with pytest.raises(TrackingError, match="cannot be written"):
        check_reachable(f"sqlite:///{tmp_path}", "an experiment")
    check_reachable(f"sqlite:///{tmp_path}/new/folder/mlflow.db", "an experiment")
    assert not list((tmp_path / "new" / "folder").iterdir())  # looking leaves no empty database behind


def test_damaged_state_is_named(uri: str, run_dir: Path) -> None:
    (run_dir / "tracking.json").write_text("{")
    with pytest.raises(TrackingError, match=r"tracking\.json is damaged"):
        open_tracker(uri, run_dir)


# ---- translation, without MLflow


def test_reading_leaves_an_unfinished_line_alone(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    Journal(path).emit(step_event(1))
    whole = path.stat().st_size
    with path.open("a") as file:
        file.write('{"kind": "step", "ti')
    content = path.read_bytes()
    assert [end for _, end in read_journal(path)] == [whole]
    assert list(read_journal(path, whole)) == []
    assert path.read_bytes() == content
    assert list(read_journal(tmp_path / "none")) == []


def test_batch_ends_at_what_is_costly_and_at_the_limit() -> None:
    many = [(step_event(step), step + 1) for step in range(MAX_POINTS)]
    batch = collect(many, Progress("uri"))
    assert batch is not None
    assert MAX_POINTS <= len(batch.points) < MAX_POINTS + 3
    assert batch.progress.offset == len(batch.points) // 3
    events = [(Event("artifact", {"path": "a"}), 1), (Event("artifact", {"path": "b"}), 2)]
    batch = collect(events, Progress("uri"))
    assert batch is not None and [str(path) for path, _ in batch.files] == ["a"]
    assert batch.progress.offset == 1
    assert collect([], batch.progress) is None


def test_collecting_does_not_touch_what_was_stored() -> None:
    stored = Progress("uri")
    collect([(step_event(5), 10)], stored)
    assert (stored.offset, stored.step, stored.sent_steps) == (0, 0, {})


def test_new_metrics_at_a_known_step_are_sent() -> None:
    first = Event("evaluation", {"split": "validation", "step": 5, "metrics": {"val/top1": 0.5}})
    again = Event("evaluation", {"split": "validation", "step": 5, "metrics": {"val/top1": 0.5, "val/ece": 0.1}})
    batch = collect([(first, 1), (again, 2)], Progress("uri"))
    assert batch is not None
    assert [point.key for point in batch.points] == ["val/top1", "val/ece"]


def test_flatten_writes_values_as_in_yaml() -> None:
    nested = {"a": {"b": {"c": 1, "none": None}, "flag": True}, "text": "x", "list": [1, "two"], "empty": {}}
    assert flatten(nested) == {
        "a.b.c": "1", "a.b.none": "null", "a.flag": "true", "text": "x", "list": '[1, "two"]', "empty": "{}",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("val/top1", "val/top1"), ("what?=%", "what___"), ("/a//b/", "a/b"), ("../../a", "a"),
        ("system/actor(pid=1, ip=::1)/busy", "system/actor_pid_1_ ip_::1_/busy"), ("", "_"), ("x" * 300, "x" * 250),
    ],
)  # fmt: skip
def test_keys_are_made_fit(name: str, expected: str) -> None:
    assert clean_key(name) == expected
