"""Runs from the command line to their end, without Ray: folders, results, and what MLflow holds."""

from __future__ import annotations

import json
import os
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest

from tests.integration.commands import STUDENT, Call, Ended, events_of, history_of, mlflow_client, read_result, run

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
    from pipeline.data.sources.digits import DigitsParams
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
    """The network's modules go where it goes: into the tracker's model, and with the run to any folder."""
    (tmp_path / "data").mkdir()
    write_pictures(tmp_path / "data" / "train.parquet", 240, seed=0)
    write_pictures(tmp_path / "data" / "test.parquet", 30, seed=1)
    (tmp_path / "own_networks.py").write_text(
        "from torch import nn\n\n\n"
        "def build(spec, width):\n"
        "    from own_layers import hidden\n\n"
        "    channels, height, length = spec.shape\n"
        "    return nn.Sequential(nn.Flatten(), *hidden(channels * height * length, width),\n"
        "                         nn.Linear(width, spec.num_classes))\n"
    )
    (tmp_path / "own_layers.py").write_text(
        "from torch import nn\n\n\ndef hidden(size, width):\n    return nn.Linear(size, width), nn.ReLU()\n"
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
    (logged,) = [
        path for path in (tmp_path / "runs" / "mlartifacts").rglob("code") if (path / "own_networks.py").exists()
    ]
    assert {path.name for path in logged.iterdir()} == {"own_layers.py", "own_networks.py", "pipeline"}
    for name in ("own_networks", "own_layers"):
        del sys.modules[name]
    (tmp_path / "elsewhere").mkdir()
    elsewhere = call(tmp_path / "elsewhere", "evaluate", f"run={tmp_path}/runs/student")
    assert elsewhere.code == 0, elsewhere.err
    assert sys.modules["own_layers"].__file__ == f"{tmp_path}/runs/student/code/student/own_layers.py"
    evaluated = json.loads(Path(elsewhere.last_line).read_text())["metrics"]
    assert evaluated["test/top1"] == metrics["test/top1"]


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
