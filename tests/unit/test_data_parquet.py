"""Parquet sources: formats, files, labels, and the sentences for everything that can be wrong with them."""

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

from pipeline.contracts.columns import LABEL, SAMPLE_ID, SPLITS, InputSpec
from pipeline.data import AugmentParams, DataSource
from pipeline.data.sources.parquet import FilesParams, ParquetParams
from pipeline.data.sources.parquet_reader import ParquetReader
from pipeline.errors import ConfigError, DataError

RGB = np.random.default_rng(0).integers(0, 256, (20, 6, 5, 3), dtype=np.uint8)
GREY = RGB[..., 0]
LABELS = np.arange(20) % 3


def encode(pixels: np.ndarray, image_format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, image_format, **options)
    return buffer.getvalue()


def write(
    path: Path,
    images: Any,
    labels: Any = LABELS,
    *,
    metadata: dict[str, Any] | None = None,
    names: tuple[str, str] = ("image", "label"),
    **options: Any,
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({names[0]: images, names[1]: labels})
    if metadata:
        table = table.replace_schema_metadata({key: json.dumps(value) for key, value in metadata.items()})
    pq.write_table(table, path, **options)
    return path


def write_png(path: Path, pixels: np.ndarray = RGB, labels: Any = None, **options: Any) -> Path:
    images = pa.array([encode(image) for image in pixels], pa.binary())
    return write(path, images, np.arange(len(pixels)) % 3 if labels is None else labels, **options)


def open_parquet(path: Path, **params: Any) -> DataSource:
    return ParquetParams(path=str(path), **params).open()


def read_all(source: DataSource) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and labels of all splits in the order of sample ids."""
    tables = [source.split(name).read(source.split(name).sample_ids) for name in SPLITS]
    table = pa.concat_tables(tables).sort_by(SAMPLE_ID)
    return source.decode(table), table[LABEL].to_numpy()


def nested(pixels: np.ndarray) -> pa.Array:
    return pa.array(pixels.tolist(), pa.list_(pa.list_(pa.list_(pa.uint8()))))


def fixed(values: np.ndarray, item: pa.DataType) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1), item), values[0].size)


COLUMNS: dict[str, Callable[[], pa.Array]] = {
    "png": lambda: pa.array([encode(image) for image in RGB], pa.binary()),
    "large_binary": lambda: pa.array([encode(image) for image in RGB], pa.large_binary()),
    "webp": lambda: pa.array([encode(image, "WEBP", lossless=True) for image in RGB], pa.binary()),
    "struct": lambda: pa.array([{"bytes": encode(image), "path": "x.png"} for image in RGB]),
    "nested": lambda: nested(RGB),
    "flat": lambda: pa.array([image.reshape(-1) for image in RGB], pa.list_(pa.uint8())),
    "fixed_flat": lambda: fixed(RGB, pa.uint8()),
    "tensor": lambda: pa.FixedShapeTensorArray.from_numpy_ndarray(RGB),
}


@pytest.mark.parametrize("name", COLUMNS)
@pytest.mark.parametrize("row_group_size", [7, 100])
def test_every_format_gives_the_same_pixels(tmp_path: Path, name: str, row_group_size: int) -> None:
    write(tmp_path / "train.parquet", COLUMNS[name](), row_group_size=row_group_size)
    source = open_parquet(tmp_path, image_size=(6, 5) if "flat" in name else None)
    assert source.spec == InputSpec("image", (3, 6, 5), ("0", "1", "2"))
    pixels, labels = read_all(source)
    np.testing.assert_array_equal(pixels, RGB.transpose(0, 3, 1, 2))
    np.testing.assert_array_equal(labels, LABELS)
    assert pixels.dtype == np.uint8
    assert labels.dtype == np.int64


def test_jpeg_decodes_as_pillow_does(tmp_path: Path) -> None:
    files = [encode(image, "JPEG") for image in RGB]
    write(tmp_path / "train.parquet", pa.array(files))
    expected = np.stack([np.asarray(Image.open(io.BytesIO(content))) for content in files])
    np.testing.assert_array_equal(read_all(open_parquet(tmp_path))[0], expected.transpose(0, 3, 1, 2))


@pytest.mark.parametrize("stored", ["png", "nested", "tensor", "flat"])
def test_grey_images_have_one_channel(tmp_path: Path, stored: str) -> None:
    column = {
        "png": lambda: pa.array([encode(image) for image in GREY]),
        "nested": lambda: pa.array(GREY.tolist(), pa.list_(pa.list_(pa.uint8()))),
        "tensor": lambda: pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(GREY)),
        "flat": lambda: fixed(np.ascontiguousarray(GREY), pa.uint8()),
    }[stored]()
    write(tmp_path / "train.parquet", column)
    source = open_parquet(tmp_path, image_size=(6, 5))
    assert source.spec.shape == (1, 6, 5)
    np.testing.assert_array_equal(read_all(source)[0][:, 0], GREY)


def test_all_images_take_the_mode_of_the_first(tmp_path: Path) -> None:
    write(tmp_path / "grey.parquet", pa.array([encode(image) for image in (GREY[0], *RGB[1:10])]), LABELS[:10])
    grey = open_parquet(tmp_path / "grey.parquet")
    assert grey.spec.shape == (1, 6, 5)
    assert read_all(grey)[0].shape == (10, 1, 6, 5)
    write(tmp_path / "rgb.parquet", pa.array([encode(image) for image in (RGB[0], *GREY[1:10])]), LABELS[:10])
    pixels, _ = read_all(open_parquet(tmp_path / "rgb.parquet"))
    np.testing.assert_array_equal(pixels[1], np.repeat(GREY[1][None], 3, axis=0))


@pytest.mark.parametrize("stored", [pa.float32(), pa.float64()])
@pytest.mark.parametrize("fixed_size", [True, False])
def test_features_are_float32(tmp_path: Path, stored: pa.DataType, fixed_size: bool) -> None:
    values = np.random.default_rng(1).normal(size=(20, 4))
    column = fixed(values, stored) if fixed_size else pa.array(values.tolist(), pa.list_(stored))
    write(tmp_path / "train.parquet", column, names=("x", "y"), row_group_size=6)
    source = open_parquet(tmp_path, image_column="x", label_column="y")
    assert source.spec.kind == "features"
    assert source.spec.shape == (4,)
    features, _ = read_all(source)
    assert features.dtype == np.float32
    np.testing.assert_array_equal(features, values.astype(np.float32))
    with pytest.raises(ConfigError, match=r"data\.augment: .* feature vectors"):
        open_parquet(tmp_path, image_column="x", label_column="y", augment=AugmentParams(flip=True))


def test_samples_are_numbered_over_sorted_files(tmp_path: Path) -> None:
    for name, rows in (("train-1", slice(5, 12)), ("train-0", slice(0, 5)), ("train-2", slice(12, 20))):
        write_png(tmp_path / f"{name}.parquet", RGB[rows], LABELS[rows], row_group_size=3)
    source = open_parquet(tmp_path)
    np.testing.assert_array_equal(read_all(source)[0], RGB.transpose(0, 3, 1, 2))
    train = source.split("train")
    ids = train.sample_ids[[9, 0, 13, 4, 9]]
    table = train.read(ids)
    np.testing.assert_array_equal(table[SAMPLE_ID].to_numpy(), ids)
    np.testing.assert_array_equal(source.decode(table), RGB[ids].transpose(0, 3, 1, 2))
    np.testing.assert_array_equal(source.load("train").read(ids), table)


def test_splits_come_from_file_names(tmp_path: Path) -> None:
    for name, rows in (("train", 10), ("val-0", 4), ("test", 6)):
        write_png(tmp_path / f"{name}.parquet", RGB[:rows])
    (tmp_path / "README.md").write_text("not data")
    source = open_parquet(tmp_path)
    assert [source.split(name).num_rows for name in SPLITS] == [10, 4, 6]
    assert source.split("test").sample_ids.tolist() == [0, 1, 2, 3, 4, 5]
    assert source.carved == {}


def test_splits_without_files_are_carved_out_of_train(tmp_path: Path) -> None:
    write_png(tmp_path / "train.parquet")
    write_png(tmp_path / "test.parquet", RGB[:6])
    source = open_parquet(tmp_path)
    assert [source.split(name).num_rows for name in SPLITS] == [18, 2, 6]
    assert source.carved == {"validation": "2 rows carved from train by seed 0"}
    together = np.concatenate([source.split("train").sample_ids, source.split("validation").sample_ids])
    assert sorted(together.tolist()) == list(range(20))


def test_files_can_be_named(tmp_path: Path) -> None:
    for name in ("a/0", "a/1", "b"):
        write_png(tmp_path / f"{name}.parquet", RGB[:10])
    source = open_parquet(tmp_path, files=FilesParams(train="a/*.parquet", test=("b.parquet",)))
    assert [source.split(name).num_rows for name in SPLITS] == [18, 2, 10]
    with pytest.raises(DataError, match=r"data.files.validation='c\*' matches no file below .*holds a/0.parquet, a/1"):
        open_parquet(tmp_path, files=FilesParams(train="a/*", validation="c*"))
    with pytest.raises(ConfigError, match=r"a/1.parquet is in both data.files.train and data.files.test"):
        open_parquet(tmp_path, files=FilesParams(train="a/*", test="a/1.parquet"))
    with pytest.raises(ConfigError, match="is a file"):
        open_parquet(tmp_path / "b.parquet", files=FilesParams(train="a/*"))


def test_a_uri_is_a_path_too(tmp_path: Path) -> None:
    write_png(tmp_path / "train.parquet")
    source = ParquetParams(path=tmp_path.as_uri()).open()
    assert source.split("train").num_rows == 14
    with pytest.raises(DataError, match=r"data.path=nothing://here cannot be opened"):
        ParquetParams(path="nothing://here").open()


HF = {"info": {"features": {"label": {"_type": "ClassLabel", "names": ["x", "y", "z"]}}}}


@pytest.mark.parametrize(
    ("metadata", "num_classes", "expected"),
    [
        (None, None, ("0", "1", "2")),
        (None, 4, ("0", "1", "2", "3")),
        ({"class_names": ["a", "b", "c", "d"]}, None, ("a", "b", "c", "d")),
        ({"class_names": ["a", "b", "c"]}, 3, ("a", "b", "c")),
        ({"huggingface": HF}, None, ("x", "y", "z")),
        ({"huggingface": {"info": {"features": {"label": {"names": None}}}}}, None, ("0", "1", "2")),
        ({"huggingface": ["of another form"]}, None, ("0", "1", "2")),
    ],
)
def test_class_names(
    tmp_path: Path, metadata: dict[str, Any] | None, num_classes: int | None, expected: tuple[str, ...]
) -> None:
    write_png(tmp_path / "train.parquet", metadata=metadata)
    assert open_parquet(tmp_path, num_classes=num_classes).spec.class_names == expected


def test_rewritten_files_do_not_come_out_of_the_cache(tmp_path: Path) -> None:
    for pixels in (RGB, RGB[::-1]):
        write(tmp_path / "train.parquet", nested(pixels))
        np.testing.assert_array_equal(read_all(open_parquet(tmp_path))[0], pixels.transpose(0, 3, 1, 2))


def test_a_file_read_in_two_sets_has_the_ids_of_each(tmp_path: Path) -> None:
    spec = InputSpec("image", RGB.transpose(0, 3, 1, 2).shape[1:], ("a", "b"))
    for name in ("a.parquet", "b.parquet"):
        write_png(tmp_path / name)
    for path, first in ((tmp_path / "b.parquet", 0), (tmp_path, len(RGB))):
        reader, _ = ParquetParams(path=str(path)).open_rows(spec)
        wanted = np.arange(first, first + len(RGB))
        assert reader.read(wanted)[SAMPLE_ID].to_pylist() == wanted.tolist()


def test_fingerprint_is_of_pixels_and_not_of_labels_or_names(tmp_path: Path) -> None:
    def fingerprint(name: str, pixels: np.ndarray, labels: np.ndarray, **options: Any) -> str:
        write_png(tmp_path / name / "train-0.parquet", pixels[:12], labels[:12], **options)
        write_png(tmp_path / name / "train-1.parquet", pixels[12:], labels[12:], **options)
        return open_parquet(tmp_path / name).fingerprint

    base = fingerprint("base", RGB, LABELS)
    assert fingerprint("moved", RGB, LABELS) == base
    assert fingerprint("relabelled", RGB, LABELS[::-1].copy()) == base
    assert fingerprint("wider_labels", RGB, np.arange(20) * 50) == base
    assert fingerprint("fewer", RGB[:19], LABELS[:19]) != base
    assert fingerprint("other_pixels", RGB // 2, LABELS) != base
    assert fingerprint("other_groups", RGB, LABELS, row_group_size=5) != base
    assert fingerprint("added_split", RGB, LABELS) == base
    write_png(tmp_path / "added_split" / "test.parquet", RGB[:4])
    assert open_parquet(tmp_path / "added_split").fingerprint != base
    assert open_parquet(tmp_path / "base", split_seed=5, validation_fraction=0.5).fingerprint == base


def test_readers_pickle_small_and_work_elsewhere(tmp_path: Path) -> None:
    write_png(tmp_path / "train.parquet", row_group_size=4)
    source = open_parquet(tmp_path)
    reader = source.split("train")
    assert isinstance(reader, ParquetReader)
    content = pickle.dumps((reader, source.decoder("train")))
    assert len(content) < 4000
    copy, decoder = pickle.loads(content)
    ids = reader.sample_ids[[3, 1]]
    np.testing.assert_array_equal(decoder.decode(copy.read(ids)), RGB[ids].transpose(0, 3, 1, 2))


def test_row_groups_are_known_by_the_ids_of_the_split(tmp_path: Path) -> None:
    write_png(tmp_path / "train-0.parquet", RGB[:11], row_group_size=4)
    write_png(tmp_path / "train-1.parquet", RGB[11:], row_group_size=4)
    source = open_parquet(tmp_path)
    reader = source.split("train")
    assert isinstance(reader, ParquetReader)
    groups = [reader.group_ids(index) for index in range(len(reader.groups))]
    np.testing.assert_array_equal(np.concatenate(groups), reader.sample_ids)
    assert reader.groups.first_row.tolist() == [0, 4, 8, 11, 15, 19]
    held_out = set(range(20)) - set(reader.sample_ids.tolist())
    assert groups[1].tolist() == [row for row in range(4, 8) if row not in held_out]
    total = sum(source.split(name).encoded_bytes for name in SPLITS)
    assert reader.group_bytes.sum() - 3 <= total <= reader.group_bytes.sum()


def test_memory_bytes_decides_what_is_held_in_memory(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", nested(RGB))
    num_bytes = open_parquet(tmp_path).split("train").encoded_bytes
    assert num_bytes == 14 * 6 * 5 * 3
    assert open_parquet(tmp_path, memory_bytes=num_bytes).in_memory("train")
    assert not open_parquet(tmp_path, memory_bytes=num_bytes - 1).in_memory("train")
