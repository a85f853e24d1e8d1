"""Rows without labels: where they are welcome, where they are refused, and in which words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.cli.main import main
from pipeline.contracts.columns import LABEL, NO_LABEL, SAMPLE_ID
from pipeline.data.sources.parquet import ParquetParams, ParquetSource
from pipeline.errors import DataError

FEATURES = np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32)
LABELS = (FEATURES[:, 0] > 0).astype(np.int64) + (FEATURES[:, 1] > 0)


def write(path: Path, rows: slice, labels: Any = None, name: str = "label", **metadata: str) -> None:
    column = pa.FixedSizeListArray.from_arrays(pa.array(FEATURES[rows].reshape(-1)), 4)
    columns = {"image": column} if labels is None else {"image": column, name: labels}
    pq.write_table(pa.table(columns, metadata=metadata or None), path, row_group_size=10)


def nulls_at(rows: list[int], number: int) -> pa.Array:
    return pa.array([None if row in rows else int(LABELS[row]) for row in range(number)], pa.int64())


def open_parquet(path: Path, **params: Any) -> ParquetSource:
    return ParquetParams(path=str(path), **params).open()


@pytest.fixture
def design(tmp_path: Path) -> Path:
    """An unlabelled set to distill on, a small labelled one to validate with."""
    write(tmp_path / "train.parquet", slice(0, 40))
    write(tmp_path / "validation.parquet", slice(40, 60), LABELS[40:60])
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(list(arguments))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


# --- reading ----------------------------------------------------------------------------------------------------


def test_nulls_are_rows_without_label(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", slice(0, 40), nulls_at([3, 17], 40))
    write(tmp_path / "validation.parquet", slice(40, 60), LABELS[40:60])
    write(tmp_path / "test.parquet", slice(40, 60), LABELS[40:60])
    source = open_parquet(tmp_path)
    table = source.load("train").table
    labels = table[LABEL].to_numpy()
    assert np.flatnonzero(labels == NO_LABEL).tolist() == [3, 17]
    np.testing.assert_array_equal(np.delete(labels, [3, 17]), np.delete(LABELS[:40], [3, 17]))
    assert set(source.unlabelled) == {"train"}
    assert source.unlabelled["train"].num_rows == 2
    assert source.unlabelled["train"].first.endswith("train.parquet: row 3 (sample 3)")


def test_a_split_may_lack_the_column(design: Path) -> None:
    source = open_parquet(design, test_fraction=0.25)
    assert source.spec.num_classes == 3  # as validation's labels say
    reader = source.split("train")
    np.testing.assert_array_equal(reader.read(reader.sample_ids[:5])[LABEL].to_numpy(), [NO_LABEL] * 5)
    assert {split: found.num_rows for split, found in source.unlabelled.items()} == {"train": 30, "test": 10}
    assert "which has no column 'label', only image" in source.unlabelled["train"].first


def test_columns_of_nulls_alone_have_a_type_of_their_own(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", slice(0, 40), pa.nulls(40))
    write(tmp_path / "validation.parquet", slice(40, 60), LABELS[40:60])
    assert open_parquet(tmp_path).unlabelled["train"].num_rows == 32


def test_labels_of_part_of_the_files_are_a_mistake(tmp_path: Path) -> None:
    write(tmp_path / "train-0.parquet", slice(0, 20), LABELS[:20])
    write(tmp_path / "train-1.parquet", slice(20, 40))
    with pytest.raises(DataError, match=r"train-1.parquet has no column 'label' \(data.label_column\), only image"):
        open_parquet(tmp_path)


@pytest.mark.parametrize(
    ("metadata", "num_classes", "expected"),
    [({}, None, 3), ({}, 5, 5), ({"class_names": '["a", "b", "c", "d"]'}, None, 4)],
)
def test_classes_without_labels_in_train(
    tmp_path: Path, metadata: dict[str, str], num_classes: int | None, expected: int
) -> None:
    write(tmp_path / "train.parquet", slice(0, 40))
    write(tmp_path / "validation.parquet", slice(40, 60), LABELS[40:60], **metadata)
    assert open_parquet(tmp_path, num_classes=num_classes).spec.num_classes == expected


def test_classes_that_nothing_tells_of(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", slice(0, 40), pa.nulls(40, pa.int64()))
    with pytest.raises(DataError, match=r"column 'label' holds nothing but nulls, so the classes cannot be counted"):
        open_parquet(tmp_path)
    write(tmp_path / "train.parquet", slice(0, 40), LABELS[:40], name="lable")
    with pytest.raises(DataError, match=r"no column 'label' \(data.label_column\), only image, lable; .* 'lable'\?"):
        open_parquet(tmp_path)


# --- commands ---------------------------------------------------------------------------------------------------

SMALL = (
    "cluster=inprocess",
    "data=parquet",
    "student=mlp",
    "train.batch_size=10",
    "train.epochs=2",
)


def test_a_loss_with_labels_refuses_rows_without(design: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = (*SMALL, f"data.path={design}", "loss=cross_entropy", f"run.dir={design}/run")
    code, _, err = run(capsys, "distill", *arguments)
    assert code == 2
    assert "32 of 32 rows of train have no label (the first: " in err
    assert "train.parquet: row 0 (sample 0), which has no column 'label', only image (data.label_column))" in err
    assert "but loss term 'ce' needs them; label them, or use a loss that learns from a teacher alone" in err
    assert err.count("\n") == 1
    assert not (design / "run").exists()


def test_a_misspelt_column_is_met_with_the_near_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "train.parquet", slice(0, 40), LABELS[:40], name="lable")
    write(tmp_path / "validation.parquet", slice(40, 60), LABELS[40:60])
    code, _, err = run(capsys, "distill", *SMALL, f"data.path={tmp_path}", "loss=cross_entropy")
    assert code == 2
    assert "which has no column 'label', only image, lable: set data.label_column=lable?" in err


def test_validation_carved_out_of_unlabelled_rows_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "train.parquet", slice(0, 60), nulls_at(list(range(50)), 60))
    code, _, err = run(
        capsys, "validate", *SMALL, f"data.path={tmp_path}", "loss=cross_entropy", "data.validation_fraction=0.2"
    )
    assert code == 2
    assert "of 36 rows of train have no label" in err  # the first of what is missing
    code, _, err = run(capsys, "validate", *SMALL, f"data.path={tmp_path}", *without_labels(tmp_path))
    assert code == 2
    assert "rows of validation have no label" in err
    assert "which is carved out of train; give labelled files for it in data.files.validation." in err


def test_in_a_folder_of_images_it_is_a_folder_that_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(40):
        folder = tmp_path / ("train", "train/cat", "train/dog")[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(folder / f"{number}.png")
    arguments = ("data=image_folder", f"data.path={tmp_path}", *without_labels(tmp_path))
    code, _, err = run(capsys, "validate", *arguments)
    assert code == 2
    assert "which is carved out of train; give labelled files for it in a folder validation." in err


def without_labels(folder: Path) -> tuple[str, ...]:
    """A loss that needs none, and a teacher for it."""
    return ("loss=kd", "loss.ce_weight=0", "teacher=mlp", f"teacher.checkpoint={folder}/teacher")


def test_the_setting_of_the_design(design: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Distill on rows without labels, validate on a few with: the run is that of the same rows with labels."""
    teacher_rows = design / "labelled"
    teacher_rows.mkdir()
    write(teacher_rows / "train.parquet", slice(0, 40), LABELS[:40])
    write(teacher_rows / "validation.parquet", slice(40, 60), LABELS[40:60])
    common = (*SMALL, "evaluation.test=false", "tracking.uri=sqlite:///" + str(design / "mlflow.db"))
    code, _, err = run(
        capsys, "train-teacher", *common, "teacher=mlp", f"data.path={teacher_rows}", f"run.dir={design}/teacher"
    )
    assert code == 0, err
    for name, path in (("with", teacher_rows), ("without", design)):
        arguments = (*common, *without_labels(design), f"data.path={path}", f"run.dir={design}/{name}")
        code, out, err = run(capsys, "distill", *arguments)
        assert code == 0, err
    losses = [
        [line for line in (design / name / "events.jsonl").read_text().splitlines() if '"kind": "evaluation"' in line]
        for name in ("with", "without")
    ]
    assert len(losses[0]) == len(losses[1]) == 2
    for one, other in zip(*losses, strict=True):
        assert one.partition('"metrics"')[2] == other.partition('"metrics"')[2]

    code, out, err = run(capsys, "validate", *common, *without_labels(design), f"data.path={design}")
    assert code == 0, err
    assert [line for line in out.splitlines() if "train" in line and " 32 " in line and line.count("32") == 2]


def test_test_rows_need_labels_where_they_are_evaluated(design: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (design / "teacher").mkdir()
    code, _, err = run(capsys, "validate", *SMALL, f"data.path={design}", *without_labels(design))
    assert code == 2
    assert "8 of 8 rows of test have no label" in err
    assert "label them, or set evaluation.test=false." in err


def test_sample_ids_do_not_depend_on_labels(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", slice(0, 40), nulls_at([1, 2], 40))
    some = open_parquet(tmp_path)
    write(tmp_path / "train.parquet", slice(0, 40), LABELS[:40])
    every = open_parquet(tmp_path)
    assert some.fingerprint == every.fingerprint
    for name in ("train", "validation", "test"):
        assert some.load(name).table[SAMPLE_ID].equals(every.load(name).table[SAMPLE_ID])
