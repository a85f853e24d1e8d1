"""Predictions for one's own rows, from the command line to the file: without Ray, and by the pool on Ray."""

from __future__ import annotations

import json
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

import pipeline.cluster.stream  # noqa: F401  # Ray Data configures its loggers when imported: before Ray is started
from pipeline.config.stored import read_run
from pipeline.contracts.columns import InputSpec
from pipeline.models import ModelParams, build_classifier, load_weights, read_card
from pipeline.models.mlp import MLPParams
from pipeline.models.small_cnn import SmallCNNParams
from tests.integration.commands import Call, Ended

SPEC = InputSpec("image", (1, 8, 8), tuple("0123456789"))
STUDENT, TEACHER = MLPParams(hidden=(16,)), SmallCNNParams(width=4)
PIXELS = np.rint(load_digits().images[:90] * (255 / 16)).astype(np.uint8)
BATCH = "evaluation.batch_size=16"  # so that the rows are several blocks, the last a short one
HERE = "cluster=inprocess"


@pytest.fixture
def folder(made: tuple[Path, Ended, Ended]) -> Path:
    """The folder with the runs."""
    return made[0]


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two files of rows, 90 in all."""
    rows = tmp_path_factory.mktemp("own")
    write_rows(rows / "a.parquet", PIXELS[:50])
    write_rows(rows / "deeper" / "b.parquet", PIXELS[50:])
    return rows


def rows_in(path: Path) -> list[str]:
    return ["data=parquet", f"data.path={path}"]


def write_rows(path: Path, pixels: np.ndarray) -> None:
    """Images as PNG, without labels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image": pa.array([encode(image) for image in pixels], pa.binary())}), path)


def encode(pixels: np.ndarray) -> bytes:
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def forward(params: ModelParams, run_dir: Path, pixels: np.ndarray) -> np.ndarray:
    """Probabilities by the network that a run kept, in one forward pass."""
    classifier = build_classifier(params, SPEC).eval()
    load_weights(classifier.network, run_dir / "model" / "model.safetensors")
    with torch.no_grad():
        return torch.softmax(classifier(torch.from_numpy(pixels[:, None].copy())), dim=1).numpy()


def probabilities(table: pa.Table) -> np.ndarray:
    return np.array(table["probabilities"].to_pylist(), np.float32)


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in paths}


# --- what is written ----------------------------------------------------------------------------------------------


def test_own_rows_in_their_order(folder: Path, own: Path, call: Call, tmp_path: Path) -> None:
    before = snapshot(folder / "runs" / "student")
    out = tmp_path / "new" / "out.parquet"
    ended = call(folder, "predict", "run=student", f"out={out}", *rows_in(own), HERE, BATCH)
    assert ended.code == 0, ended.err
    assert snapshot(folder / "runs" / "student") == before

    table = pq.read_table(out)
    assert table["sample_id"].to_pylist() == list(range(90))
    assert [Path(name).name for name in table["file"].to_pylist()] == ["a.parquet"] * 50 + ["b.parquet"] * 40
    assert table["row"].to_pylist() == [*range(50), *range(40)]
    expected = forward(STUDENT, folder / "runs" / "student", PIXELS)
    np.testing.assert_allclose(probabilities(table), expected, rtol=1e-5, atol=1e-6)
    assert table["label"].to_pylist() == expected.argmax(axis=1).tolist()
    assert table["class_name"].to_pylist() == [str(label) for label in expected.argmax(axis=1)]
    np.testing.assert_array_equal(table["probability"].to_numpy(), probabilities(table).max(axis=1))
    metadata = table.schema.metadata
    assert json.loads(metadata[b"class_names"]) == list("0123456789")
    name = read_run(folder / "runs" / "student").name
    assert metadata[b"run"].decode() == name
    assert metadata[b"weights_fingerprint"].decode() == read_card(folder / "runs" / "student" / "model").fingerprint

    lines = ended.out.splitlines()
    assert lines[0] == f"the student of run {name} (mlp) predicts 90 rows: {own}"
    assert lines[-1] == str(out)
    counts = {line.split()[0]: int(line.split()[1]) for line in lines if line[:1].isdigit() and len(line.split()) == 3}
    assert counts == {str(label): count for label, count in enumerate(np.bincount(expected.argmax(axis=1))) if count}


def test_network_of_a_teachers_run(folder: Path, own: Path, call: Call, tmp_path: Path) -> None:
    ended = call(
        folder,
        "predict",
        "run=runs/teacher",
        f"out={tmp_path}/out.parquet",
        *rows_in(own / "a.parquet"),
        HERE,
        BATCH,
    )
    assert ended.code == 0, ended.err
    assert "(small_cnn) predicts 50 rows" in ended.out
    expected = forward(TEACHER, folder / "runs" / "teacher", PIXELS[:50])
    np.testing.assert_allclose(probabilities(pq.read_table(tmp_path / "out.parquet")), expected, rtol=1e-4, atol=1e-6)


def test_without_data_it_is_the_test_split_of_the_run(folder: Path, call: Call, tmp_path: Path) -> None:
    from pipeline.data.sources.digits import DigitsParams

    ended = call(folder, "predict", "run=student", f"out={tmp_path}/out.parquet", HERE)
    assert ended.code == 0, ended.err
    assert "the test split of digits, as no data=... is given" in ended.out
    source = DigitsParams().open()
    split = source.load("test")
    table = pq.read_table(tmp_path / "out.parquet")
    assert "file" not in table.column_names
    assert table["sample_id"].to_pylist() == split.sample_ids.tolist()
    pixels = source.decode(split.read(split.sample_ids))[:, 0]
    expected = forward(STUDENT, folder / "runs" / "student", pixels)
    np.testing.assert_allclose(probabilities(table), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("ray_cluster")
def test_pool_on_ray_writes_what_one_process_does(folder: Path, own: Path, call: Call, tmp_path: Path) -> None:
    here, pool = tmp_path / "here.parquet", tmp_path / "pool.parquet"
    assert call(folder, "predict", "run=student", f"out={here}", *rows_in(own), HERE, BATCH).code == 0
    ended = call(
        folder, "predict", "run=student", f"out={pool}", *rows_in(own), "cluster=ray", BATCH, "teacher.pool.max=2"
    )
    assert ended.code == 0, ended.err
    assert "prediction actor" in ended.out
    expected, found = pq.read_table(here), pq.read_table(pool)
    assert found.schema.equals(expected.schema, check_metadata=True)
    for name in ("sample_id", "file", "row", "label", "class_name"):
        assert found[name].to_pylist() == expected[name].to_pylist()
    np.testing.assert_allclose(probabilities(found), probabilities(expected), rtol=1e-5, atol=1e-7)
    assert sorted(tmp_path.iterdir()) == [here, pool]

    # A row that is wrong in the middle is met by a task of Ray's, and named all the same.
    write_rows(tmp_path / "bad" / "a.parquet", PIXELS[:40])
    spoil(tmp_path / "bad" / "a.parquet", 20)
    bad = tmp_path / "bad.parquet"
    ended = call(folder, "predict", "run=student", f"out={bad}", *rows_in(tmp_path / "bad"), "cluster=ray", BATCH)
    assert ended.code == 1
    assert "a.parquet: row 20" in ended.err
    assert sorted(tmp_path.glob("*.*")) == [here, pool]
    skipping = [*rows_in(tmp_path / "bad"), "data.on_bad_row=skip"]
    ended = call(folder, "predict", "run=student", f"out={bad}", *skipping, "cluster=driver", BATCH)
    assert ended.code == 0, ended.err
    assert pq.read_table(bad)["label"].is_null().to_numpy().nonzero()[0].tolist() == [20]


# --- what is wrong ------------------------------------------------------------------------------------------------


def spoil(path: Path, *rows: int) -> None:
    """Puts something that is no image into rows of a file."""
    images = pq.read_table(path)["image"].to_pylist()
    for row in rows:
        images[row] = b"no image"
    pq.write_table(pa.table({"image": pa.array(images, pa.binary())}), path)


def test_rows_that_cannot_be_decoded(folder: Path, call: Call, tmp_path: Path) -> None:
    rows, out = tmp_path / "rows", tmp_path / "out.parquet"
    write_rows(rows / "a.parquet", PIXELS[:33])
    spoil(rows / "a.parquet", 5, 32)  # the second is a block of its own
    ended = call(folder, "predict", "run=student", f"out={out}", *rows_in(rows), HERE, BATCH)
    assert ended.code == 1
    assert "a.parquet: row 5 (sample 5) is not an image" in ended.err
    assert [path.name for path in tmp_path.iterdir()] == ["rows"]

    ended = call(folder, "predict", "run=student", f"out={out}", *rows_in(rows), HERE, BATCH, "data.on_bad_row=skip")
    assert ended.code == 0, ended.err
    assert "no prediction for 2 rows that could not be decoded: " in ended.out
    assert "a.parquet: row 5 (sample 5)" in ended.out
    table = pq.read_table(out)
    assert table["sample_id"].to_pylist() == list(range(33))
    assert table["label"].is_null().to_numpy().nonzero()[0].tolist() == [5, 32]
    good = np.setdiff1d(np.arange(33), [5, 32])
    expected = forward(STUDENT, folder / "runs" / "student", PIXELS[good])
    np.testing.assert_allclose(probabilities(table)[good], expected, rtol=1e-5, atol=1e-6)


def test_images_of_another_size(folder: Path, call: Call, tmp_path: Path) -> None:
    write_rows(tmp_path / "wide.parquet", np.zeros((3, 8, 9), np.uint8))
    ended = call(
        folder, "predict", "run=student", f"out={tmp_path}/out.parquet", *rows_in(tmp_path / "wide.parquet"), HERE
    )
    assert ended.code == 2
    assert "data.image_size=[8,8]" in ended.err
    assert not (tmp_path / "out.parquet").exists()
    wide = [*rows_in(tmp_path / "wide.parquet"), "data.image_size=[8,8]"]
    ended = call(folder, "predict", "run=student", f"out={tmp_path}/out.parquet", *wide, HERE)
    assert ended.code == 0, ended.err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["out=x.parquet"], "predict needs run=RUN"),
        (["run=student"], "predict needs out=FILE.parquet"),
        (["run=student", "out="], "out=: expected the name of a Parquet file, got nothing"),
        (["run=student", "out=x.csv"], "expected a name that ends in .parquet"),
        (["run=student", "out=s3://bucket/x.parquet"], "out: expected a path on a disk of this machine"),
        (["run=student", "out={own}/a.parquet"], "exists already; remove it or name another file"),
        (["run=student", "out={own}/a.parquet/x.parquet"], "its folder cannot be made"),
        (["run=nothing", "out=x.parquet"], "no run 'nothing'"),
        (["run={unfinished}", "out=x.parquet"], "has not finished"),
        (["run=student", "out=x.parquet", "student.hidden=[8]"], "student.hidden=[8]: predict takes the network as"),
        (["run=student", "out=x.parquet", "loss=kd"], "expected data, cluster, teacher.pool or evaluation.batch_size"),
        (["run=student", "out=x.parquet", "data=parquet", "data.path=nowhere"], "nowhere"),
        (["run=student", "out=x.parquet", "evaluation.batch_size=0"], "evaluation.batch_size: expected a value >= 1"),
    ],
)
def test_what_is_wrong_is_said_before_work(
    arguments: list[str], sentence: str, folder: Path, own: Path, call: Call, tmp_path: Path
) -> None:
    for name in ("run.json", "config.yaml", "status.json"):
        (tmp_path / name).write_bytes((folder / "runs" / "student" / name).read_bytes())
    named = [argument.format(own=own, unfinished=tmp_path) for argument in arguments]
    ended = call(folder, "predict", *named, HERE)
    assert ended.code == 2
    assert sentence in ended.err
    assert not (folder / "x.parquet").exists()
