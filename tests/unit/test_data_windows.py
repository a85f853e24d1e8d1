"""A split in memory, under one window that covers it, and under small windows: the same samples, pixel for pixel."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.contracts.columns import INPUT, LABEL, LABEL_WEIGHT, PARTNER_LABEL, SAMPLE_ID
from pipeline.data import AugmentParams, BlockPlanner, DataSource, TableReader, decode_block, read_blocks
from pipeline.data.sources import parquet_reader as parquet_reader_module
from pipeline.data.sources.image_folder import ImageFolderParams
from pipeline.data.sources.parquet import ParquetParams
from pipeline.training import TrainParams, make_planner, open_training

NUM_ROWS = 120
GROUP_ROWS = 7
BATCH_SIZE = 8
SEED = 4
LABELS = np.arange(NUM_ROWS) * 3 // NUM_ROWS
PIXELS = np.random.default_rng(0).integers(0, 256, (NUM_ROWS, 6, 5, 3), dtype=np.uint8)
ENOUGH_BYTES = 2**20
AUGMENTS = {
    "plain": AugmentParams(crop_padding=1, flip=True),
    "mixed": AugmentParams(flip=True, mixup=0.5, cutmix=1.0),
    "boxes": AugmentParams(random_resized_crop=(0.3, 1.0)),
}
Sample = dict[str, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same images in the same order, sorted by class: encoded and raw in Parquet files, and as a folder a class."""
    folder: Path = tmp_path_factory.mktemp("data")
    images = []
    for number, pixels in enumerate(PIXELS):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        images.append(buffer.getvalue())
        path = folder / "images" / f"class-{LABELS[number]}" / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(images[-1])
    raw = pa.FixedShapeTensorArray.from_numpy_ndarray(PIXELS)
    for name, column in {"encoded": pa.array(images), "raw": raw}.items():
        table = pa.table({"image": column, "label": LABELS})
        pq.write_table(table, folder / f"{name}.parquet", row_group_size=GROUP_ROWS)
    return folder


def open_source(folder: Path, name: str, augment: AugmentParams, memory_bytes: int, window_bytes: int) -> DataSource:
    values: dict[str, Any] = {
        "augment": augment,
        "memory_bytes": memory_bytes,
        "window_bytes": window_bytes,
        "num_views": 2,
    }
    if name == "image_folder":
        return ImageFolderParams(path=str(folder / "images"), **values).open()
    return ParquetParams(path=str(folder / f"{name}.parquet"), **values).open()


def run_epochs(source: DataSource, augment: AugmentParams, window_bytes: int) -> list[Sample]:
    """The blocks of three epochs, as the runs of this configuration see them."""
    reader = open_training(source)
    data = ParquetParams(path="", window_bytes=window_bytes, num_views=2)
    planner: BlockPlanner = make_planner(data, reader, TrainParams(batch_size=BATCH_SIZE), SEED)
    blocks = []
    for plan in planner.blocks(0, 3 * planner.blocks_per_epoch):
        table = read_blocks(reader, [plan], augment, SEED)
        blocks.append(decode_block(table, source.decoder("train"), augment, SEED))
    return blocks


@pytest.mark.parametrize("name", ["encoded", "raw", "image_folder"])
@pytest.mark.parametrize("augment", AUGMENTS.values(), ids=AUGMENTS)
def test_memory_and_one_window_give_the_same_run(folder: Path, name: str, augment: AugmentParams) -> None:
    in_memory = open_source(folder, name, augment, ENOUGH_BYTES, 1000)
    one_window = open_source(folder, name, augment, 0, ENOUGH_BYTES)
    assert isinstance(open_training(in_memory), TableReader)
    assert not isinstance(open_training(one_window), TableReader)
    check_same(run_epochs(in_memory, augment, 1000), run_epochs(one_window, augment, ENOUGH_BYTES))


@pytest.mark.parametrize("memory_bytes", [0, ENOUGH_BYTES], ids=["window", "memory"])
@pytest.mark.parametrize("name", ["raw", "image_folder"])
@pytest.mark.parametrize("augment", [AUGMENTS["plain"], AUGMENTS["boxes"]], ids=["plain", "boxes"])
def test_every_format_gives_the_same_run(folder: Path, augment: AugmentParams, name: str, memory_bytes: int) -> None:
    """Not with mixed images: an image folder has no row groups to choose partners from."""
    encoded = open_source(folder, "encoded", augment, ENOUGH_BYTES, ENOUGH_BYTES)
    other = open_source(folder, name, augment, memory_bytes, ENOUGH_BYTES)
    check_same(run_epochs(encoded, augment, ENOUGH_BYTES), run_epochs(other, augment, ENOUGH_BYTES))


def check_same(expected: list[Sample], taken: list[Sample]) -> None:
    assert len(expected) == len(taken) == 3 * 10
    for one, other in zip(expected, taken, strict=True):
        assert one.keys() == other.keys()
        for column in one:
            np.testing.assert_array_equal(one[column], other[column])


@pytest.mark.parametrize("augment", AUGMENTS.values(), ids=AUGMENTS)
def test_small_windows_give_every_sample_once_and_its_own_pixels(folder: Path, augment: AugmentParams) -> None:
    in_memory = open_source(folder, "encoded", augment, ENOUGH_BYTES, 1000)
    windows = open_source(folder, "encoded", augment, 0, 2000)
    expected: dict[tuple[int, int], Sample] = {}
    for samples, is_oracle in ((run_epochs(in_memory, augment, 1), True), (run_epochs(windows, augment, 2000), False)):
        for epoch in range(3):
            blocks = samples[epoch * 10 : epoch * 10 + 10]
            ids = np.concatenate([block[SAMPLE_ID] for block in blocks])
            assert len(set(ids.tolist())) == 80  # of 84: the rest of an epoch is less than a block
            for block in blocks:
                for row, sample_id in enumerate(block[SAMPLE_ID].tolist()):
                    names = {INPUT, LABEL, PARTNER_LABEL, LABEL_WEIGHT} & block.keys()
                    sample = {column: block[column][row] for column in names}
                    if is_oracle:
                        expected[epoch % 2, sample_id] = sample
                    elif (epoch % 2, sample_id) in expected:
                        known = expected[epoch % 2, sample_id]
                        assert all(np.array_equal(sample[column], known[column]) for column in names)


def test_mixing_changes_pixels_and_adds_two_columns(folder: Path) -> None:
    augment = AUGMENTS["mixed"]
    source = open_source(folder, "encoded", augment, ENOUGH_BYTES, 1)
    plain = AugmentParams(flip=True)
    for mixed, own in zip(run_epochs(source, augment, 1), run_epochs(source, plain, 1), strict=True):
        assert mixed.keys() - own.keys() == {PARTNER_LABEL, LABEL_WEIGHT}
        assert mixed[PARTNER_LABEL].dtype == np.int64
        assert mixed[LABEL_WEIGHT].dtype == np.float32
        np.testing.assert_array_equal(mixed[LABEL], own[LABEL])
        np.testing.assert_array_equal(mixed[INPUT][mixed[LABEL_WEIGHT] == 1], own[INPUT][mixed[LABEL_WEIGHT] == 1])
        assert not np.array_equal(mixed[INPUT], own[INPUT])


def test_partners_show_the_pixels_they_have_as_samples(folder: Path) -> None:
    """The mix of a block is that of the augmented pixels of both, taken from blocks that are not mixed."""
    from pipeline.data.pixels.mixing import draw_partners, mix

    augment, plain = AUGMENTS["mixed"], AugmentParams(flip=True)
    source = open_source(folder, "encoded", augment, ENOUGH_BYTES, 1)
    reader, decoder = open_training(source), source.decoder("train")
    planner = make_planner(ParquetParams(path=""), reader, TrainParams(batch_size=BATCH_SIZE), SEED)
    plan = planner.block(3)
    block = decode_block(read_blocks(reader, [plan], augment, SEED), decoder, augment, SEED)
    partner_ids = draw_partners(plan.sample_ids, plan.view, SEED, reader.rows, reader.groups)
    assert (plan.sample_ids // GROUP_ROWS == partner_ids // GROUP_ROWS).all()
    shown = []
    for sample_ids in (plan.sample_ids, partner_ids):
        other = type(plan)(plan.position, plan.epoch, plan.view, sample_ids)
        shown.append(decode_block(read_blocks(reader, [other]), decoder, plain, SEED))
    inputs, weights = mix(shown[0][INPUT], shown[1][INPUT], plan.sample_ids, plan.view, SEED, augment)
    np.testing.assert_array_equal(block[INPUT], inputs)
    np.testing.assert_array_equal(block[LABEL_WEIGHT], weights)
    np.testing.assert_array_equal(block[PARTNER_LABEL], shown[1][LABEL])


def test_a_process_keeps_two_windows_at_most(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = parquet_reader_module._GroupCache()
    monkeypatch.setattr(parquet_reader_module, "_CACHE", cache)
    read: list[int] = []
    original = parquet_reader_module.ParquetReader._read_group

    def record(self: Any, file: Any, index: int) -> pa.Table:
        read.append(index)
        return original(self, file, index)

    monkeypatch.setattr(parquet_reader_module.ParquetReader, "_read_group", record)
    window_bytes = 4000
    source = open_source(folder, "encoded", AUGMENTS["mixed"], 0, window_bytes)
    reader = open_training(source)
    planner = make_planner(ParquetParams(path="", window_bytes=window_bytes), reader, TrainParams(batch_size=8), SEED)
    kept = []
    for plan in planner.blocks(0, planner.blocks_per_epoch):
        read_blocks(reader, [plan], AUGMENTS["mixed"], SEED)
        kept.append(sum(table.nbytes for table in cache._groups.values()))
    assert max(kept) <= 2 * window_bytes < reader.encoded_bytes
    # Each group once, although rows come shuffled and with partners; one may hold but rows that sit the epoch out.
    assert len(set(read)) == len(read) >= len(reader.groups or ()) - 1
