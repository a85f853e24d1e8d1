"""The sentences for everything that can be wrong with Parquet files."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.contracts.columns import SPLITS
from pipeline.data import DataSource
from pipeline.data.sources.parquet import ParquetParams
from pipeline.errors import DataError, PipelineError

RGB = np.random.default_rng(0).integers(0, 256, (20, 6, 5, 3), dtype=np.uint8)
GREY = RGB[..., 0]
LABELS = np.arange(20) % 3
FLAT = pa.FixedSizeListArray.from_arrays(pa.array(RGB.reshape(-1)), 90)


def encode(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


PNGS = [encode(image) for image in RGB]


def write(
    path: Path,
    images: Any,
    labels: Any = LABELS,
    *,
    metadata: dict[str, Any] | None = None,
    names: tuple[str, str] = ("image", "label"),
    **options: Any,
) -> Path:
    table = pa.table({names[0]: images, names[1]: labels})
    if metadata:
        table = table.replace_schema_metadata({key: json.dumps(value) for key, value in metadata.items()})
    pq.write_table(table, path, **options)
    return path


def write_png(path: Path, num_rows: int = 20, labels: Any = None, **options: Any) -> Path:
    images = pa.array(PNGS[:num_rows], pa.binary())
    return write(path, images, LABELS[:num_rows] if labels is None else labels, **options)


def open_parquet(path: Path, **params: Any) -> DataSource:
    return ParquetParams(path=str(path), **params).open()


def read_all(source: DataSource) -> None:
    for name in SPLITS:
        source.decode(source.load(name).table)


def nested(pixels: np.ndarray) -> pa.Array:
    return pa.array(pixels.tolist(), pa.list_(pa.list_(pa.list_(pa.uint8()))))


def no_folder(path: Path) -> dict[str, Any]:
    return {"path": str(path / "absent")}


def no_train(path: Path) -> dict[str, Any]:
    write_png(path / "test.parquet")
    return {}


def nothing_there(path: Path) -> dict[str, Any]:
    return {}


def cut_short(path: Path) -> dict[str, Any]:
    file = write_png(path / "train.parquet")
    file.write_bytes(file.read_bytes()[:-10])
    return {}


def other_column(path: Path) -> dict[str, Any]:
    write(path / "train.parquet", pa.array(PNGS), names=("images", "label"))
    return {}


def no_label_column(path: Path) -> dict[str, Any]:
    write(path / "train.parquet", pa.array(PNGS), names=("image", "target"))
    return {}


def text_column(path: Path) -> dict[str, Any]:
    write(path / "train.parquet", ["a"] * 20)
    return {}


def text_labels(path: Path) -> dict[str, Any]:
    write_png(path / "train.parquet", labels=["cat"] * 20)
    return {}


def negative_label(path: Path) -> dict[str, Any]:
    write_png(path / "train.parquet", labels=np.where(np.arange(20) == 7, -1, LABELS))
    return {}


def label_out_of_range(path: Path) -> dict[str, Any]:
    write_png(path / "train.parquet")
    write_png(path / "test-0.parquet", 4)
    write_png(path / "test-1.parquet", 2, labels=[0, 3])
    return {}


def other_class_count(path: Path) -> dict[str, Any]:
    write_png(path / "train.parquet", metadata={"class_names": ["a", "b", "c"]})
    return {"num_classes": 10}


def one_class(path: Path) -> dict[str, Any]:
    write_png(path / "train.parquet", labels=[0] * 20)
    return {}


def empty_split(path: Path) -> dict[str, Any]:
    write_png(path / "train.parquet")
    write_png(path / "test.parquet", 0)
    return {}


def too_few_rows(path: Path) -> dict[str, Any]:
    write_png(path / "train.parquet", 2, labels=[0, 1])
    return {}


def mixed_types(path: Path) -> dict[str, Any]:
    write_png(path / "train-0.parquet")
    write(path / "train-1.parquet", nested(RGB))
    return {}


def flat_without_size(path: Path) -> dict[str, Any]:
    write(path / "train.parquet", FLAT)
    return {}


def flat_with_wrong_size(path: Path) -> dict[str, Any]:
    write(path / "train.parquet", FLAT)
    return {"image_size": (4, 7)}


def channels_first(path: Path) -> dict[str, Any]:
    write(path / "train.parquet", nested(RGB.transpose(0, 3, 1, 2)))
    return {}


def integer_lists(path: Path) -> dict[str, Any]:
    write(path / "train.parquet", pa.array([[1, 2]] * 20, pa.list_(pa.int64())))
    return {}


def null_image(path: Path) -> dict[str, Any]:
    write(path / "train.parquet", pa.array([None] + [encode(RGB[0])] * 19))
    return {}


def paths_only(path: Path) -> dict[str, Any]:
    images = pa.array([{"bytes": None, "path": "a.png"}] * 20, pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    write(path / "train.parquet", images)
    return {}


def not_an_image(path: Path) -> dict[str, Any]:
    write(path / "train.parquet", pa.array([b"no image at all"] * 20))
    return {}


def deep_image(path: Path) -> dict[str, Any]:
    write(path / "train.parquet", pa.array([encode(GREY[0].astype(np.uint16))] * 20))
    return {}


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (no_folder, r"data\.path=.*/absent does not exist; give a folder"),
        (no_train, r"holds no train\*\.parquet \(it holds test\.parquet\); rename .* data\.files\.train"),
        (nothing_there, r"holds no train\*\.parquet \(it holds none at all\)"),
        (cut_short, r"train\.parquet is not a readable Parquet file \(.*\); it may be cut short"),
        (other_column, r"has no column 'image' \(data\.image_column\), only images, label; .* did you mean 'images'\?"),
        (no_label_column, r"has no column 'label' \(data\.label_column\), only image, target; set data\.label_column"),
        (text_column, r"column 'image' has type string, expected encoded images .* data\.image_column"),
        (text_labels, r"label column 'label' has type string, expected integers .* data\.label_column"),
        (negative_label, r"train\.parquet: row 7 \(sample 7\) has label -1, expected 0 to 2"),
        (label_out_of_range, r"test-1\.parquet: row 1 \(sample 5\) has label 3, expected 0 to 2; .* data\.num_classes"),
        (other_class_count, r"names 3 classes in its metadata, but data\.num_classes=10"),
        (one_class, r"train has one class only, expected two or more"),
        (empty_split, r"test\.parquet: the files of split 'test' hold no rows"),
        (too_few_rows, r"hold 2 rows, too few to carve 1 for validation and 1 for test"),
        (mixed_types, r"train-1\.parquet: column 'image' has type list.*, expected binary as in the first file"),
        (flat_without_size, r"flat lists of 90 uint8 values; .* data\.image_size=\[32,32\]"),
        (flat_with_wrong_size, r"holds 90 values a row, which is no multiple of data\.image_size 4 x 7 = 28"),
        (channels_first, r"pixels of shape \(3, 6, 5\), expected .* store the channels last"),
        (integer_lists, r"holds lists of int64, 1 deep, expected encoded images"),
        (null_image, r"column 'image' is null in its first row"),
        (paths_only, r"holds no bytes in its first row; store the images inside the file"),
        (
            not_an_image,
            r"the first row is not an image that can be read \(15 bytes of unknown format\); expected one of PNG",
        ),
        (deep_image, r"the first row is an image of mode 'I;16', with more than 8 bits a channel"),
    ],
)
def test_what_is_wrong_is_said_when_opening(
    tmp_path: Path, make: Callable[[Path], dict[str, Any]], sentence: str
) -> None:
    params = {"path": str(tmp_path)} | make(tmp_path)
    with pytest.raises(DataError, match=sentence) as caught:
        ParquetParams(**params).open()
    assert "\n" not in caught.value.message
    assert isinstance(pickle.loads(pickle.dumps(caught.value)), PipelineError)


def test_bad_rows_are_named_when_read(tmp_path: Path) -> None:
    good = PNGS[:10]
    write(tmp_path / "train-0.parquet", pa.array(good), LABELS[:10])
    cases = {
        r"train-1.parquet: row 1 \(sample 11\) is not an image that can be read": b"junk",
        r"train-1.parquet: row 1 \(sample 11\) is a damaged image": encode(RGB[0])[:90],
        r"row 1 \(sample 11\) is an image of height 3 and width 4, expected 6 and 5": encode(RGB[0, :3, :4]),
        r"train-1.parquet: row 1 \(sample 11\) holds a null": None,
    }
    for sentence, content in cases.items():
        write(tmp_path / "train-1.parquet", pa.array([good[0], content, good[1]]), LABELS[:3])
        source = open_parquet(tmp_path, validation_fraction=0.01, test_fraction=0.01)
        name = next(name for name in SPLITS if 11 in source.split(name).sample_ids)
        with pytest.raises(DataError, match=sentence):
            source.decoder(name).decode(source.split(name).read(np.array([11])))


def test_ragged_rows_are_named_when_read(tmp_path: Path) -> None:
    lists = [image.tolist() for image in RGB]
    lists[13] = RGB[13, :, :4].tolist()
    write(tmp_path / "train.parquet", pa.array(lists, pa.list_(pa.list_(pa.list_(pa.uint8())))), row_group_size=5)
    with pytest.raises(DataError, match=r"row 13 \(sample 13\) has a list of 4 values in column 'image', expected 5"):
        read_all(open_parquet(tmp_path))


def test_features_that_are_not_finite_are_named(tmp_path: Path) -> None:
    values = np.zeros((20, 2))
    values[4, 1] = np.nan
    write(tmp_path / "train.parquet", pa.array(values.tolist()))
    with pytest.raises(DataError, match=r"sample 4 holds a feature that is NaN or infinite"):
        read_all(open_parquet(tmp_path))


def test_files_that_change_during_a_run_are_noticed(tmp_path: Path) -> None:
    file = write_png(tmp_path / "train.parquet")
    reader = open_parquet(tmp_path).split("train")
    write_png(file, 10)
    with pytest.raises(DataError, match=r"row group 0 has 10 rows, expected 20; the file has changed"):
        reader.read(reader.sample_ids)
    file.unlink()
    with pytest.raises(DataError, match=r"cannot read row group 0 .* restore it"):
        reader.read(reader.sample_ids)
