"""Blocks: what is read, decoded and augmented does not depend on how blocks are grouped into tasks."""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.contracts.columns import BLOCK, INPUT, LABEL, SAMPLE_ID, VIEW
from pipeline.data import (
    AugmentParams,
    BlockPlanner,
    DataSource,
    EpochOrder,
    SplitReader,
    augment,
    decode_block,
    iterate_rows,
    read_blocks,
)
from pipeline.data.sources.digits import DigitsParams
from pipeline.data.sources.parquet import ParquetParams
from pipeline.errors import StreamError

AUGMENT = AugmentParams(crop_padding=1, flip=True)
PIXELS = np.random.default_rng(0).integers(0, 256, (40, 6, 5, 3), dtype=np.uint8)


@pytest.fixture(scope="module", params=["digits", "parquet"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> DataSource:
    if request.param == "digits":
        return DigitsParams().open()
    images = []
    for pixels in PIXELS:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        images.append(buffer.getvalue())
    folder: Path = tmp_path_factory.mktemp("data")
    pq.write_table(pa.table({"image": images, "label": np.arange(40) % 4}), folder / "train.parquet", row_group_size=6)
    return ParquetParams(path=str(folder), memory_bytes=0, window_bytes=2000).open()


def plan_blocks(reader: SplitReader, num_views: int | None = None) -> BlockPlanner:
    return BlockPlanner(EpochOrder(reader, 5, window_bytes=2000), reader.num_rows, 8, num_views)


def test_a_block_is_the_same_alone_and_among_others(source: DataSource) -> None:
    reader, decoder = source.split("train"), source.decoder("train")
    planner = plan_blocks(reader)
    start, stop = planner.blocks_per_epoch - 2, planner.blocks_per_epoch + 2  # over the end of an epoch
    together = read_blocks(reader, planner.blocks(start, stop))
    assert together.schema.field(VIEW).type == pa.int32()
    assert together.schema.field(BLOCK).type == pa.int64()
    for number, plan in enumerate(planner.blocks(start, stop)):
        alone = decode_block(read_blocks(reader, [plan]), decoder, AUGMENT, 9)
        part = decode_block(together.slice(number * 8, 8), decoder, AUGMENT, 9)
        assert alone.keys() == part.keys() == {SAMPLE_ID, VIEW, BLOCK, INPUT, LABEL}
        for name in alone:
            np.testing.assert_array_equal(alone[name], part[name])
        np.testing.assert_array_equal(alone[SAMPLE_ID], plan.sample_ids)
        assert set(alone[BLOCK].tolist()) == {plan.position}
        assert set(alone[VIEW].tolist()) == {plan.view} == {plan.epoch}


def test_blocks_hold_the_rows_of_the_source(source: DataSource) -> None:
    train = source.load("train")
    plan = plan_blocks(source.split("train")).block(1)
    block = decode_block(read_blocks(source.split("train"), [plan]), source.decoder("train"), AUGMENT, 9)
    raw = train.read(plan.sample_ids)
    np.testing.assert_array_equal(block[LABEL], raw[LABEL].to_numpy())
    expected = augment(source.decode(raw), plan.sample_ids, plan.view, 9, AUGMENT)
    np.testing.assert_array_equal(block[INPUT], expected)
    assert {name: values.dtype.name for name, values in block.items()} == {
        SAMPLE_ID: "int64",
        VIEW: "int32",
        BLOCK: "int64",
        INPUT: "uint8",
        LABEL: "int64",
    }
    assert all(values.flags.writeable for values in block.values())


def test_a_sample_looks_the_same_wherever_it_comes(source: DataSource) -> None:
    reader = source.split("train")
    planner = plan_blocks(reader, num_views=1)
    seen: dict[int, np.ndarray] = {}
    for plan in planner.blocks(0, 2 * planner.blocks_per_epoch):
        block = decode_block(read_blocks(reader, [plan]), source.decoder("train"), AUGMENT, 9)
        for sample_id, pixels in zip(block[SAMPLE_ID].tolist(), block[INPUT], strict=True):
            np.testing.assert_array_equal(seen.setdefault(sample_id, pixels), pixels)


def test_merged_blocks_are_refused(source: DataSource) -> None:
    reader = source.split("train")
    table = read_blocks(reader, plan_blocks(reader).blocks(1, 3))
    with pytest.raises(StreamError, match="8 rows of blocks 1 to 2 arrived as one block"):
        decode_block(table.slice(4, 8), source.decoder("train"), AUGMENT, 0)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_share_evaluation_rows_without_overlap(source: DataSource, world_size: int) -> None:
    reader = source.split("test")
    shares = [
        list(iterate_rows(source.decoder("test"), reader, rank, world_size, batch_size=4)) for rank in range(world_size)
    ]
    for rank, batches in enumerate(shares):
        ids = np.concatenate([batch[SAMPLE_ID] for batch in batches])
        np.testing.assert_array_equal(ids, reader.sample_ids[rank::world_size])
        assert all(len(batch[INPUT]) == len(batch[LABEL]) == 4 for batch in batches[:-1])
    first = shares[0][0]
    assert all(values.flags.writeable for values in first.values())
    np.testing.assert_array_equal(first[INPUT], source.decode(reader.read(first[SAMPLE_ID])))


def test_more_ranks_than_rows_gives_empty_shares(source: DataSource) -> None:
    reader = source.split("validation")
    assert list(iterate_rows(source.decoder("validation"), reader, reader.num_rows, reader.num_rows + 1, 4)) == []


def test_decoders_pickle_small(source: DataSource) -> None:
    decoder = pickle.loads(pickle.dumps(source.decoder("train")))
    assert decoder == source.decoder("train")
    assert len(pickle.dumps(decoder)) < 500
