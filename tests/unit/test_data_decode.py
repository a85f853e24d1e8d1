"""Images of many sizes: resized and cut as torchvision does it; and rows that a trained network is to predict."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.contracts.columns import ENCODED, LABEL, NO_LABEL, SAMPLE_ID, InputSpec
from pipeline.data import AugmentParams, BlockPlan, Decoder, decode_block, read_blocks
from pipeline.data.pixels.augment import draw_boxes
from pipeline.data.sources.digits import DigitsParams
from pipeline.data.sources.parquet import ParquetParams
from pipeline.errors import ConfigError, DataError

SIZES = [(6, 5), (40, 31), (9, 50), (17, 17), (8, 8), (100, 64)]
IMAGES = [np.random.default_rng(n).integers(0, 256, (*size, 3), dtype=np.uint8) for n, size in enumerate(SIZES)]
SPEC = InputSpec("image", (3, 6, 5), ("a", "b", "c"))


def encode(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def table_of(images: list[np.ndarray]) -> pa.Table:
    encoded = pa.array([encode(image) for image in images], pa.large_binary())
    return pa.table({SAMPLE_ID: np.arange(len(images)), ENCODED: encoded, LABEL: np.zeros(len(images), np.int64)})


@pytest.mark.parametrize("side", [8, 17, 64])
def test_images_are_resized_as_torchvision_does(side: int) -> None:
    from torchvision.transforms import v2

    transform = v2.Compose([v2.Resize(side), v2.CenterCrop(side)])
    expected = np.stack([np.asarray(transform(Image.fromarray(image))) for image in IMAGES])
    pixels = Decoder("image", (3, side, side), image_size=(side, side)).decode(table_of(IMAGES))
    np.testing.assert_array_equal(pixels, expected.transpose(0, 3, 1, 2))


def test_other_sides_just_cover_the_image() -> None:
    ramp = np.repeat(np.arange(64, dtype=np.uint8)[None, :, None] * 4, 16, axis=0).repeat(3, axis=2)
    pixels = Decoder("image", (3, 8, 20), image_size=(8, 20)).decode(table_of([ramp]))
    halved = np.asarray(Image.fromarray(ramp).resize((32, 8), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(pixels[0], halved[:, 6:26].transpose(2, 0, 1))


def test_images_of_the_right_size_stay_as_they_are() -> None:
    decoder = Decoder("image", (3, 6, 5), image_size=(6, 5))
    np.testing.assert_array_equal(decoder.decode(table_of(IMAGES[:1]))[0], IMAGES[0].transpose(2, 0, 1))


def test_without_a_size_all_images_have_that_of_the_first() -> None:
    with pytest.raises(DataError, match=r"height 40 and width 31, expected 6 and 5 .* set data.image_size=\[6,5\]"):
        Decoder("image", (3, 6, 5)).decode(table_of(IMAGES[:2]))


@pytest.mark.parametrize("stored", ["encoded", "pixels"])
def test_boxes_are_cut_out_of_what_is_stored(stored: str) -> None:
    images = [IMAGES[1], IMAGES[1][::-1]]
    seen: list[np.ndarray] = []

    def choose(sizes: np.ndarray) -> np.ndarray:
        seen.append(sizes)
        return np.array([[3, 2, 20, 30], [0, 0, 31, 40]])

    table, decoder = table_of(images), Decoder("image", (3, 12, 9))
    if stored == "pixels":
        flat = pa.FixedSizeListArray.from_arrays(pa.array(np.stack(images).reshape(-1)), 40 * 31 * 3)
        table = table.set_column(1, ENCODED, flat)
        decoder = Decoder("image", (3, 12, 9), stored_size=(40, 31))
    pixels = decoder.decode(table, choose)
    assert seen[0].tolist() == [[40, 31], [40, 31]]
    for pixel, image, box in zip(pixels, images, [(3, 2, 20, 30), (0, 0, 31, 40)], strict=True):
        expected = Image.fromarray(image).resize((9, 12), Image.Resampling.BILINEAR, box=box)
        np.testing.assert_array_equal(pixel, np.asarray(expected).transpose(2, 0, 1))


def write(path: Path, images: list[np.ndarray], **columns: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image": [encode(image) for image in images], **columns}), path)


def test_photographs_of_many_sizes_train(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", IMAGES * 5, label=np.arange(30) % 3)
    augment = AugmentParams(random_resized_crop=(0.2, 1.0))
    source = ParquetParams(path=str(tmp_path), image_size=(12, 9), augment=augment).open()
    assert source.spec.shape == (3, 12, 9)
    reader = source.split("train")
    plan = BlockPlan(0, 1, 1, reader.sample_ids[:8])
    block = decode_block(read_blocks(reader, [plan]), source.decoder("train"), augment, 3)
    sizes = np.array([SIZES[sample_id % 6] for sample_id in plan.sample_ids.tolist()])
    boxes = draw_boxes(sizes, plan.sample_ids, 1, 3, augment)
    for pixels, sample_id, box in zip(block["input"], plan.sample_ids.tolist(), boxes.tolist(), strict=True):
        image = Image.fromarray(IMAGES[sample_id % 6])
        expected = np.asarray(image.resize((9, 12), Image.Resampling.BILINEAR, box=box))
        np.testing.assert_array_equal(pixels, expected.transpose(2, 0, 1))
    held_out = source.load("validation").table
    assert source.decode(held_out).shape == (3, 3, 12, 9)


def test_raw_pixels_are_resized_too(tmp_path: Path) -> None:
    lists = pa.array([IMAGES[1].tolist()] * 10, pa.list_(pa.list_(pa.list_(pa.uint8()))))
    pq.write_table(pa.table({"image": lists, "label": np.arange(10) % 2}), tmp_path / "train.parquet")
    plain = ParquetParams(path=str(tmp_path)).open()
    source = ParquetParams(path=str(tmp_path), image_size=(10, 10)).open()
    assert (plain.spec.shape, source.spec.shape) == ((3, 40, 31), (3, 10, 10))
    assert plain.fingerprint != source.fingerprint
    encoded = Decoder("image", (3, 10, 10), image_size=(10, 10)).decode(table_of([IMAGES[1]]))
    np.testing.assert_array_equal(source.decode(source.load("test").table)[0], encoded[0])


def test_features_have_no_size(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [[1.0, 2.0]] * 10, "label": np.arange(10) % 2}), tmp_path / "train.parquet")
    with pytest.raises(ConfigError, match=r"data.image_size is for images, but column 'image' holds feature vectors"):
        ParquetParams(path=str(tmp_path), image_size=(3, 3)).open()


# --- rows to predict --------------------------------------------------------------------------------------------


def test_all_rows_below_the_folder_in_order(tmp_path: Path) -> None:
    same = [np.full((6, 5, 3), number, np.uint8) for number in range(9)]
    write(tmp_path / "b.parquet", same[4:6])
    write(tmp_path / "a" / "z.parquet", same[0:4])
    write(tmp_path / "b" / "test.parquet", same[6:9])
    write(tmp_path / ".hidden" / "c.parquet", same)
    (tmp_path / "a" / "notes.txt").write_text("no data")
    reader, decoder = ParquetParams(path=str(tmp_path)).open_rows(SPEC)
    table = reader.read(reader.sample_ids)
    assert reader.num_rows == 9
    assert decoder.decode(table)[:, 0, 0, 0].tolist() == list(range(9))
    assert set(table[LABEL].to_pylist()) == {NO_LABEL}
    assert [file.path.removeprefix(str(tmp_path)) for file in decoder.files] == [
        "/a/z.parquet", "/b.parquet", "/b/test.parquet",
    ]  # fmt: skip
    reader, _ = ParquetParams(path=str(tmp_path / "b.parquet")).open_rows(SPEC)
    assert reader.num_rows == 2


def test_rows_that_do_not_fit_the_network(tmp_path: Path) -> None:
    write(tmp_path / "rgb.parquet", IMAGES[1:3])
    write(tmp_path / "grey.parquet", [IMAGES[0][..., 0]])
    write(tmp_path / "empty.parquet", [])
    pq.write_table(pa.table({"image": [[1.0, 2.0]]}), tmp_path / "features.parquet")
    pq.write_table(pa.table({"image": [IMAGES[0][..., 0].tolist()]}, schema=pa.schema(
        [("image", pa.list_(pa.list_(pa.uint8())))])), tmp_path / "raw.parquet")  # fmt: skip

    def open_rows(name: str, spec: InputSpec = SPEC, **params: Any) -> tuple[Any, Decoder]:
        return ParquetParams(path=str(tmp_path / name), **params).open_rows(spec)

    with pytest.raises(DataError, match=r"\(3, 40, 31\), expected .* \(3, 6, 5\) .* set data.image_size=\[6,5\]"):
        open_rows("rgb.parquet")
    with pytest.raises(DataError, match=r"\(3, 4, 4\), expected .* set data.image_size=\[6,5\]"):
        open_rows("rgb.parquet", image_size=(4, 4))
    reader, decoder = open_rows("rgb.parquet", image_size=(6, 5))
    assert decoder.decode(reader.read(reader.sample_ids)).shape == (2, 3, 6, 5)
    with pytest.raises(DataError, match=r"holds feature vectors of length 2, expected images .* as the network was"):
        open_rows("features.parquet")
    with pytest.raises(DataError, match=r"feature vectors of length 2, expected feature vectors of length 3"):
        open_rows("features.parquet", InputSpec("features", (3,), ("a", "b")))
    # Grey image files are shown to a network of three channels as grey in all three; raw pixels are as they are.
    reader, decoder = open_rows("grey.parquet")
    np.testing.assert_array_equal(decoder.decode(reader.read(reader.sample_ids))[0], [IMAGES[0][..., 0]] * 3)
    with pytest.raises(DataError, match=r"\(1, 6, 5\), expected .*; give images of 3 channels"):
        open_rows("raw.parquet")
    with pytest.raises(DataError, match=r"\(3, 40, 31\), expected .*; give images of 1 channels"):
        open_rows("rgb.parquet", InputSpec("image", (1, 40, 31), ("a", "b")))
    with pytest.raises(DataError, match=r"hold no rows"):
        open_rows("empty.parquet")
    with pytest.raises(DataError, match=r"absent does not exist; give a folder of Parquet files"):
        open_rows("absent")
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match=r"holds no \*.parquet \(it holds none at all\)"):
        open_rows("none")


def test_other_sets_offer_their_test_split() -> None:
    source = DigitsParams().open()
    reader, decoder = DigitsParams().open_rows(source.spec)
    np.testing.assert_array_equal(reader.sample_ids, source.split("test").sample_ids)
    assert decoder == source.decoder("test")
    with pytest.raises(DataError, match=r"data=digits holds images of .* \(1, 8, 8\), expected .*channels"):
        DigitsParams().open_rows(SPEC)
