"""Runs from the command line to their end, without Ray: folders, results, exit codes, and what MLflow holds."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.cli.main import main
from pipeline.contracts.events import read_events
from tests.integration.mlflow_server import Server

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 120.0
TEACHER = ["teacher.width=4", "cluster=inprocess"]
STUDENT = [*TEACHER, "teacher.checkpoint=runs/teacher", "student=mlp", "student.hidden=[16]"]
NOTHING_LISTENS = "http://127.0.0.1:9"


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


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """As ``run``, within this process, which saves the imports."""

    def called(folder: Path, *arguments: str) -> Ended:
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "path", [*sys.path])
        capsys.readouterr()
        code = main(arguments)
        return Ended(code, *capsys.readouterr())

    return called


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ended, Ended]:
    """A folder with a teacher and a student distilled from it, and what the two commands said."""
    folder = tmp_path_factory.mktemp("made")
    teacher = run(folder, "train-teacher", "run.dir=runs/teacher", *TEACHER, "train.epochs=2")
    assert teacher.code == 0, teacher.err
    student = run(folder, "distill", "run.dir=runs/student", *STUDENT, "train.epochs=3", "run.seed=5")
    assert student.code == 0, student.err
    return folder, teacher, student


@pytest.fixture
def workspace(made: tuple[Path, Ended, Ended], tmp_path: Path) -> Path:
    """A folder with its own copy of the teacher."""
    shutil.copytree(made[0] / "runs" / "teacher", tmp_path / "runs" / "teacher")
    return tmp_path


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


# --- the journey --------------------------------------------------------------------------------------------------


def test_commands_end_with_their_result(made: tuple[Path, Ended, Ended]) -> None:
    folder, *ended = made
    for name, command in zip(("teacher", "student"), ended, strict=True):
        run_dir = folder / "runs" / name
        assert command.last_line == str(run_dir / "result.json")
        assert f"go on with it: python -m pipeline {'train-teacher' if name == 'teacher' else 'distill'}" in command.out
        assert "Traceback" not in command.err
        assert json.loads((run_dir / "status.json").read_text())["status"] == "finished"
        assert max(map(len, command.out.splitlines())) < 250


def test_result_has_the_keys_that_others_rely_on(made: tuple[Path, Ended, Ended]) -> None:
    teacher, student = (read_result(made[0] / "runs" / name) for name in ("teacher", "student"))
    for result, name in ((teacher, "teacher"), (student, "student")):
        assert result["status"] == "finished"
        assert result["exit_code"] == 0
        assert result["run_dir"] == str(made[0] / "runs" / name)
        assert len(result["config_hash"]) == 12
        assert result["mlflow_run_id"]
        assert result["num_parameters"] > 0
        assert result["samples_per_s"] > 0
        assert "error" not in result
    scores = {"top1", "top5", "nll", "brier", "ece", "num_rows"}
    compared = scores | {"agreement", "teacher_kl"}
    for result, names in ((teacher, scores), (student, compared)):
        assert set(result["metrics"]) == {f"{split}/{name}" for split in ("val", "test") for name in names}
    assert student["metrics"]["val/num_rows"] == 180
    assert student["metrics"]["test/num_rows"] == 359
    # Three epochs are few, but a network that learns nothing has 0.1.
    assert min(teacher["metrics"]["test/top1"], student["metrics"]["test/top1"]) > 0.2


def test_kept_is_the_best_validation(made: tuple[Path, Ended, Ended]) -> None:
    run_dir = made[0] / "runs" / "student"
    evaluations = [event for event in events_of(run_dir, "evaluation") if event["split"] == "validation"]
    best = max(evaluations, key=lambda event: (event["metrics"]["val/top1"], -event["step"]))
    result = read_result(run_dir)
    assert len(evaluations) == 3
    assert (result["best_step"], result["best_epoch"]) == (best["step"], best["epoch"])
    assert {name: result["metrics"][name] for name in best["metrics"]} == best["metrics"]


def test_evaluate_finds_the_same_metrics(made: tuple[Path, Ended, Ended]) -> None:
    run_dir = made[0] / "runs" / "student"
    before = (run_dir / "result.json").read_bytes()
    ended = run(made[0], "evaluate", "run=student")
    assert ended.code == 0, ended.err
    assert ended.last_line == str(run_dir / "evaluate" / "result.json")
    evaluated = read_result(run_dir / "evaluate")
    assert evaluated["metrics"] == pytest.approx(read_result(run_dir)["metrics"], rel=1e-12)
    assert (run_dir / "result.json").read_bytes() == before


def test_mlflow_holds_the_whole_run(made: tuple[Path, Ended, Ended]) -> None:
    run_dir = made[0] / "runs" / "student"
    result = read_result(run_dir)
    client = mlflow_client(f"sqlite:///{made[0]}/runs/mlflow.db")
    stored = client.get_run(result["mlflow_run_id"])
    assert (stored.info.status, stored.info.run_name) == ("FINISHED", "digits/mlp<-small_cnn/kd/s5")

    params = stored.data.params
    assert params["loss.temperature"] == "4.0"
    assert (params["train.epochs"], params["train.blocks_per_step"], params["student.hidden"]) == ("3", "1", "[16]")
    assert params["teacher.checkpoint"] == str(made[0] / "runs" / "teacher")

    evaluated = [event for event in events_of(run_dir, "evaluation") if event["split"] == "validation"]
    top1 = [event["metrics"]["val/top1"] for event in evaluated]
    assert history_of(client, stored.info.run_id, "val/top1") == [(19, top1[0]), (38, top1[1]), (57, top1[2])]
    assert history_of(client, stored.info.run_id, "val_by_epoch/top1") == list(enumerate(top1, start=1))
    assert history_of(client, stored.info.run_id, "test/top1") == [
        (result["best_step"], result["metrics"]["test/top1"])
    ]
    steps = [event["step"] for event in events_of(run_dir, "step")]
    assert [step for step, _ in history_of(client, stored.info.run_id, "train/kd")] == steps

    tags = stored.data.tags
    provenance = json.loads((run_dir / "provenance.json").read_text())
    assert (tags["command"], tags["config_hash"]) == ("distill", result["config_hash"])
    assert (tags["run_dir"], tags["teacher_fingerprint"]) == (str(run_dir), provenance["teacher"])
    (dataset,) = stored.inputs.dataset_inputs
    assert (dataset.dataset.name, dataset.dataset.digest) == ("digits", provenance["data"])
    files = [file.path for file in client.list_artifacts(stored.info.run_id, "run")]
    assert files == ["run/config.yaml", "run/provenance.json"]


def test_student_in_mlflow_predicts(made: tuple[Path, Ended, Ended], monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.data.digits import DigitsParams
    from pipeline.tracking.quiet import import_mlflow

    mlflow = import_mlflow()
    uri = f"sqlite:///{made[0]}/runs/mlflow.db"
    monkeypatch.setattr(sys, "path", [*sys.path])  # loading puts the model's own code in front
    result = read_result(made[0] / "runs" / "student")
    (output,) = mlflow_client(uri).get_run(result["mlflow_run_id"]).outputs.model_outputs
    mlflow.set_tracking_uri(uri)
    try:
        model = mlflow.pyfunc.load_model(f"models:/{output.model_id}")
    finally:
        mlflow.set_tracking_uri(None)
    assert "uint8" in str(model.metadata.signature.inputs)
    source = DigitsParams(name="digits").open()
    test = source.split("test")
    table = test.read(test.sample_ids)
    probabilities = model.predict(source.decode(table))
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)
    accuracy = np.mean(probabilities.argmax(axis=1) == table["label"].to_numpy())
    assert accuracy == pytest.approx(result["metrics"]["test/top1"])


def test_validate_tells_what_distill_did(made: tuple[Path, Ended, Ended], call: Call) -> None:
    checkpoint = f"teacher.checkpoint={made[0]}/runs/teacher"
    ended = call(made[0], "validate", *STUDENT, checkpoint, "train.epochs=3", "run.seed=5")
    assert ended.code == 0, ended.err
    assert f"config hash {read_result(made[0] / 'runs' / 'student')['config_hash']}" in ended.out
    assert "57 steps" in ended.out
    assert "ok: nothing was started" in ended.out


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


# --- one's own data and networks ----------------------------------------------------------------------------------


def write_pictures(path: Path, num_rows: int, seed: int) -> None:
    """Noisy grey pictures, one brighter quarter a class, as PNG in Hugging Face's layout."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    random = np.random.default_rng(seed)
    labels = np.arange(num_rows) % 3
    pictures = []
    for label in labels:
        pixels = random.integers(0, 60, (12, 12, 3), dtype=np.uint8)
        pixels[6 * (label // 2) : 6 * (label // 2) + 6, 6 * (label % 2) : 6 * (label % 2) + 6] += 150
        file = BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        pictures.append({"bytes": file.getvalue(), "path": None})
    table = pa.table({"image": pictures, "label": pa.array(labels, pa.int64())})
    names = json.dumps(["upper left", "upper right", "lower left"])
    pq.write_table(table.replace_schema_metadata({"class_names": names}), path)


def test_own_pictures_and_own_network(tmp_path: Path, call: Call) -> None:
    (tmp_path / "data").mkdir()
    write_pictures(tmp_path / "data" / "train.parquet", 240, seed=0)
    write_pictures(tmp_path / "data" / "test.parquet", 30, seed=1)
    (tmp_path / "own_networks.py").write_text(
        "from torch import nn\n\n\n"
        "def build(spec, width):\n"
        "    channels, height, length = spec.shape\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(channels * height * length, width), nn.ReLU(),\n"
        "                         nn.Linear(width, spec.num_classes))\n"
    )
    (tmp_path / "conf" / "data").mkdir(parents=True)
    (tmp_path / "conf" / "data" / "quarters.yaml").write_text(
        "name: parquet\npath: data\nvalidation_fraction: 0.2\naugment:\n  crop_padding: 1\n"
    )
    common = ["--conf", "conf", "data=quarters", "cluster=inprocess", "train.batch_size=16", "train.optimizer.lr=0.02"]
    teacher = ["teacher=small_cnn", "teacher.width=4"]
    ended = call(tmp_path, "train-teacher", "run.dir=runs/teacher", *common, *teacher, "train.epochs=3")
    assert ended.code == 0, ended.err
    own = ["student=custom", "student.factory=own_networks:build", "student.kwargs={width: 8}"]
    ended = call(
        tmp_path, "distill", "run.dir=runs/student", *common, *teacher, *own, "teacher.checkpoint=runs/teacher"
    )
    assert ended.code == 0, ended.err
    metrics = read_result(tmp_path / "runs" / "student")["metrics"]
    assert (metrics["val/num_rows"], metrics["test/num_rows"]) == (48, 30)
    assert metrics["test/top1"] > 0.9
    (test,) = [event for event in events_of(tmp_path / "runs" / "student", "evaluation") if event["split"] == "test"]
    assert set(test["per_class"]) == {"upper left", "upper right", "lower left"}


@pytest.mark.slow
@pytest.mark.skipif("DISTILL_DATA" not in os.environ, reason="real data: set DISTILL_DATA to the folder with cifar100/")
def test_a_shard_of_cifar100(tmp_path: Path, call: Call) -> None:
    folder = Path(os.environ["DISTILL_DATA"]) / "cifar100"
    data = ["data=parquet", f"data.path={folder}", "data.files.train=train-00000-of-00004.parquet"]
    data += ["data.files.test=test.parquet", "data.augment.crop_padding=4", "data.augment.flip=true"]
    ended = call(
        tmp_path, "train-teacher", "run.dir=runs/teacher", *data, "teacher.width=8", "train.epochs=1",
        "train.batch_size=128", "cluster=inprocess",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    metrics = read_result(tmp_path / "runs" / "teacher")["metrics"]
    assert (metrics["val/num_rows"], metrics["test/num_rows"]) == (1_250, 10_000)
    assert metrics["test/top1"] > 0.03  # three times chance


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
