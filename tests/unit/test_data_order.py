"""The order of training: permutations, windows of row groups, blocks."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data import BlockPlanner, EpochOrder, RowSet, SplitReader, TableReader
from pipeline.data.sources.parquet import ParquetParams
from pipeline.data.sources.parquet_reader import ParquetReader
from pipeline.data.sources.source import make_table
from pipeline.errors import DataError

ROW_BYTES = 8  # two float32 features
GROUP_ROWS = 10


def table_reader(num_rows: int) -> TableReader:
    encoded = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(num_rows, np.uint8)), 1)
    return TableReader(
        make_table(np.arange(num_rows), encoded, pa.array(np.zeros(num_rows, np.int64))), RowSet.whole(num_rows)
    )


@pytest.fixture
def grouped(tmp_path: Path) -> ParquetReader:
    """85 rows in nine groups of ten (the last of five), of which some belong to validation and test."""
    values = np.arange(170, dtype=np.float32)
    column = pa.FixedSizeListArray.from_arrays(pa.array(values), 2)
    table = pa.table({"image": column, "label": np.arange(85) % 2})
    pq.write_table(table, tmp_path / "train.parquet", row_group_size=GROUP_ROWS)
    reader = ParquetParams(path=str(tmp_path)).open().split("train")
    assert isinstance(reader, ParquetReader)
    return reader


def window_order(reader: SplitReader, seed: int = 0, num_groups: int = 3) -> EpochOrder:
    return EpochOrder(reader, seed, window_bytes=num_groups * GROUP_ROWS * ROW_BYTES)


def test_every_row_once_in_every_epoch(grouped: ParquetReader) -> None:
    for order in (EpochOrder(table_reader(60), 0), window_order(grouped)):
        epochs = [order.ids(epoch, 0, order.num_rows) for epoch in range(3)]
        expected = np.sort(epochs[0])
        for ids in epochs:
            assert len(np.unique(ids)) == order.num_rows
            np.testing.assert_array_equal(np.sort(ids), expected)
        assert not np.array_equal(epochs[0], epochs[1])
        assert not np.array_equal(epochs[1], epochs[2])
    np.testing.assert_array_equal(expected, grouped.sample_ids)


def test_any_slice_is_a_slice_of_the_epoch(grouped: ParquetReader) -> None:
    for order in (EpochOrder(table_reader(60), 3), window_order(grouped, seed=3, num_groups=2)):
        whole = order.ids(1, 0, order.num_rows)
        for start, stop in ((0, 1), (7, 43), (15, 16), (40, order.num_rows), (0, order.num_rows)):
            np.testing.assert_array_equal(order.ids(1, start, stop), whole[start:stop])


def test_seed_changes_the_order(grouped: ParquetReader) -> None:
    for make in (lambda seed: EpochOrder(table_reader(60), seed), lambda seed: window_order(grouped, seed)):
        assert not np.array_equal(make(0).ids(0, 0, 50), make(1).ids(0, 0, 50))
        np.testing.assert_array_equal(make(0).ids(0, 0, 50), make(0).ids(0, 0, 50))


def test_windows_are_of_whole_groups(grouped: ParquetReader) -> None:
    order = window_order(grouped)
    ids = order.ids(0, 0, order.num_rows)
    owners = ids // GROUP_ROWS
    sizes = [len(grouped.group_ids(index)) for index in range(9)]
    position, windows = 0, []
    while position < len(ids):
        # Three groups of ten rows fit; the group of five rows leaves room for no fourth one of ten.
        groups = list(dict.fromkeys(owners[position:].tolist()))[:3]
        count = sum(sizes[group] for group in groups)
        assert set(owners[position : position + count].tolist()) == set(groups)
        windows.append(set(groups))
        position += count
    assert len(windows) == 3
    assert set().union(*windows) == set(range(9))
    assert any(np.diff(owners[:20]) != 0)  # rows of a window's groups are mixed


def test_a_group_larger_than_the_window_is_a_window(grouped: ParquetReader) -> None:
    order = EpochOrder(grouped, 0, window_bytes=1)
    owners = order.ids(0, 0, order.num_rows) // GROUP_ROWS
    assert (np.diff(owners) != 0).sum() == 8


def test_reading_a_window_touches_only_its_groups(grouped: ParquetReader, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    original = ParquetReader._read_group

    def record(self: ParquetReader, file: object, index: int) -> pa.Table:
        read.append(index)
        return original(self, file, index)  # type: ignore[arg-type]

    monkeypatch.setattr(ParquetReader, "_read_group", record)
    order = window_order(grouped)
    windows = order._windows(0)
    for window, groups in enumerate(windows.groups):
        for start in range(int(windows.starts[window]), int(windows.starts[window + 1]), 4):
            ids = order.ids(0, start, min(start + 4, int(windows.starts[window + 1])))
            grouped.read(ids)
        assert sorted(read) == sorted(groups.tolist())  # each once, however many reads
        read.clear()


def test_groups_without_rows_of_the_split_are_passed_over(tmp_path: Path) -> None:
    column = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(20, np.float32)), 1)
    pq.write_table(
        pa.table({"image": column, "label": np.arange(20) % 2}), tmp_path / "train.parquet", row_group_size=1
    )
    reader = ParquetParams(path=str(tmp_path)).open().split("train")
    order = EpochOrder(reader, 0, window_bytes=8)
    np.testing.assert_array_equal(np.sort(order.ids(0, 0, 14)), reader.sample_ids)


def test_orders_are_golden(grouped: ParquetReader) -> None:
    """Part of the contract: a change here makes resumed runs see other samples.

    The last ones come from the keys alone: groups by ``permutation(9, (GROUP_KEY, 0, 1))``, three to a window, then the
    ids of window w, ascending, by ``permutation(n, (ORDER_KEY, 0, 1, w))``.
    """
    assert EpochOrder(table_reader(10), 0).ids(0, 0, 10).tolist() == [9, 2, 4, 7, 5, 0, 8, 6, 3, 1]
    assert EpochOrder(table_reader(10), 7).ids(2, 0, 10).tolist() == [5, 1, 4, 8, 6, 7, 3, 0, 9, 2]
    assert window_order(grouped).ids(1, 18, 30).tolist() == [83, 37, 21, 52, 17, 13, 14, 54, 27, 53, 50, 26]


def test_orders_pickle_small(grouped: ParquetReader) -> None:
    for order in (EpochOrder(table_reader(10**5), 0), window_order(grouped)):
        before = order.ids(4, 5, 20)
        content = pickle.dumps(order)
        assert len(content) < 2000
        np.testing.assert_array_equal(pickle.loads(content).ids(4, 5, 20), before)


def test_one_window_over_everything_is_the_order_in_memory(grouped: ParquetReader) -> None:
    in_memory = EpochOrder(TableReader(grouped.read(grouped.sample_ids), grouped.rows, grouped.groups), 3)
    for order in (window_order(grouped, seed=3, num_groups=9), EpochOrder(grouped, 3)):
        for epoch in range(3):
            np.testing.assert_array_equal(order.ids(epoch, 0, 59), in_memory.ids(epoch, 0, 59))
    assert not np.array_equal(window_order(grouped, seed=3).ids(0, 0, 59), in_memory.ids(0, 0, 59))


def test_blocks_follow_each_other_without_padding() -> None:
    order = EpochOrder(table_reader(23), 0)
    planner = BlockPlanner(order, 23, 5, None)
    assert planner.blocks_per_epoch == 4
    plans = list(planner.blocks(0, 9))
    assert [plan.position for plan in plans] == list(range(9))
    assert [plan.epoch for plan in plans] == [0, 0, 0, 0, 1, 1, 1, 1, 2]
    assert [plan.view for plan in plans] == [plan.epoch for plan in plans]
    assert [planner.epoch_of(plan.position) for plan in plans] == [plan.epoch for plan in plans]
    assert {len(plan.sample_ids) for plan in plans} == {5}
    for epoch in range(2):
        seen = np.concatenate([plan.sample_ids for plan in plans if plan.epoch == epoch])
        np.testing.assert_array_equal(seen, order.ids(epoch, 0, 20))
    np.testing.assert_array_equal(planner.block(6).sample_ids, plans[6].sample_ids)


def test_views_repeat_where_their_number_is_set() -> None:
    planner = BlockPlanner(EpochOrder(table_reader(10), 0), 10, 5, 2)
    assert [planner.block(position).view for position in range(0, 10, 2)] == [0, 1, 0, 1, 0]


def test_a_batch_larger_than_the_split_is_refused() -> None:
    order = EpochOrder(table_reader(10), 0)
    assert BlockPlanner(order, 10, 10, None).blocks_per_epoch == 1
    with pytest.raises(DataError, match=r"train.batch_size=11 is larger than the train split of 10 rows"):
        BlockPlanner(order, 10, 11, None)
