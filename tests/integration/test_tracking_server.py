"""The tracker and a real MLflow server that comes and goes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.contracts.columns import InputSpec
from pipeline.contracts.events import Event, Journal
from pipeline.errors import TrackingError
from pipeline.tracking import Tracker
from tests.integration.mlflow_server import Server

TIMEOUT_S = 90.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Not started yet; one for all tests, because starting it takes ten seconds."""
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.kill()


def open_tracker(server: Server, run_dir: Path, required: bool) -> Tracker:
    return Tracker.open(
        server.uri,
        "an experiment",
        run_dir,
        "digits/kd/s0",
        required=required,
        params={"loss": {"name": "kd"}, "train": {"note": ""}},
        tags={"command": "distill"},
        dataset={"name": "digits", "fingerprint": "abcdef", "num_rows": 10, "path": "digits"},
    )


def step_event(step: int) -> Event:
    return Event("step", {"step": step, "epoch": 0, "metrics": {"train/loss": 1 / (step + 1)}, "data_wait": 0.1})


def mlflow_client(server: Server) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(server.uri)


def sent_steps(server: Server, tracker: Tracker) -> list[int]:
    return [point.step for point in mlflow_client(server).get_metric_history(tracker.run_id, "train/loss")]


def test_server_that_crashes_gets_the_whole_history(server: Server, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    server.kill()
    with pytest.raises(TrackingError, match="cannot be reached"):
        open_tracker(server, run_dir, required=True)

    # Not there at the start: the run begins without it.
    journal = Journal(run_dir / "events.jsonl")
    journal.emit(Event("status", {"status": "running"}))
    tracker = open_tracker(server, run_dir, required=False)
    for step in range(10):
        journal.emit(step_event(step))
    assert not tracker.flush(0.1)
    server.start()
    assert tracker.flush(TIMEOUT_S), tracker.problem
    assert tracker.run_id
    assert sent_steps(server, tracker) == list(range(10))

    # It crashes while the run goes on.
    server.kill()
    for step in range(10, 1500):
        journal.emit(step_event(step))
    assert not tracker.flush(1.0)
    assert "cannot be reached" in str(tracker.problem)

    # The driver ends before it is back, and another one goes on with the run.
    assert not tracker.close(0.1)
    run_id = tracker.run_id
    server.start()
    tracker = open_tracker(server, run_dir, required=True)
    (run_dir / "notes.txt").write_text("kept")
    journal.emit(Event("artifact", {"path": "notes.txt", "folder": "run"}))
    journal.emit(Event("status", {"status": "killed", "message": "stopped by signal 15"}))
    assert tracker.close(TIMEOUT_S), tracker.problem
    assert tracker.run_id == run_id
    assert sent_steps(server, tracker) == list(range(1500))

    client = mlflow_client(server)
    run = client.get_run(run_id)
    assert (run.info.status, run.data.params) == ("KILLED", {"loss.name": "kd", "train.note": ""})
    assert [file.path for file in client.list_artifacts(run_id, "run")] == ["run/notes.txt"]


def test_model_from_the_server_works_on_its_own(server: Server, tmp_path: Path) -> None:
    """Loaded by a process that does not have this checkout on its path, as a model server's."""
    import torch

    from pipeline.models import MODELS, ModelCard, build_classifier, save_model

    run_dir = tmp_path / "run"
    spec = InputSpec("features", (5,), ("a", "b"))
    params: Any = MODELS.get("mlp").model_validate({"name": "mlp", "hidden": [4]})
    classifier = build_classifier(params, spec).eval()
    save_model(run_dir / "model", classifier, ModelCard.describe(params, classifier, {}, "data"))
    Journal(run_dir / "events.jsonl").emit(Event("model", {"path": str(run_dir / "model")}))
    server.start()
    tracker = open_tracker(server, run_dir, required=True)
    assert tracker.close(TIMEOUT_S), tracker.problem

    (output,) = mlflow_client(server).get_run(tracker.run_id).outputs.model_outputs
    inputs = np.linspace(-1, 1, 15, dtype=np.float32).reshape(3, 5)
    np.save(tmp_path / "inputs.npy", inputs)
    script = (
        "import mlflow, numpy\n"
        f"model = mlflow.pyfunc.load_model('models:/{output.model_id}')\n"
        f"numpy.save('{tmp_path}/outputs.npy', model.predict(numpy.load('{tmp_path}/inputs.npy')))\n"
        "import pipeline; print(pipeline.__file__)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"MLFLOW_TRACKING_URI": server.uri, "MLFLOW_DISABLE_TELEMETRY": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "code/pipeline/__init__.py" in done.stdout
    with torch.inference_mode():
        expected = classifier(torch.from_numpy(inputs)).softmax(-1).numpy()
    np.testing.assert_allclose(np.load(tmp_path / "outputs.npy"), expected, rtol=1e-5)
