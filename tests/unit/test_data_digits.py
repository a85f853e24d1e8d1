"""The digits, carved splits, and readers of tables."""

from __future__ import annotations

import pickle
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest

from pipeline.contracts.columns import ENCODED, LABEL, SAMPLE_ID, SPLITS
from pipeline.data import DATASETS, DataSource, EpochOrder, RowSet, TableReader
from pipeline.data.order.rows import CARVE_KEY, ORDER_KEY, carve, permutation
from pipeline.data.sources.digits import DigitsParams
from pipeline.errors import DataError


@pytest.fixture(scope="module")
def digits() -> DataSource:
    return DigitsParams().open()


def test_digits_are_what_scikit_learn_has(digits: DataSource) -> None:
    from sklearn.datasets import load_digits

    original = load_digits()
    assert digits.spec.shape == (1, 8, 8)
    assert digits.spec.class_names == tuple("0123456789")
    for name in SPLITS:
        table = digits.load(name).read(digits.split(name).sample_ids)
        pixels = digits.decode(table)
        assert pixels.dtype == np.uint8
        assert pixels.shape == (table.num_rows, 1, 8, 8)
        ids = table[SAMPLE_ID].to_numpy()
        np.testing.assert_array_equal(np.rint(pixels[:, 0] / (255 / 16)), original.images[ids])
        np.testing.assert_array_equal(table[LABEL].to_numpy(), original.target[ids])
        np.testing.assert_array_equal(digits.decoder(name).decode(table), pixels)


def test_splits_are_disjoint_and_complete(digits: DataSource) -> None:
    ids = [digits.split(name).sample_ids for name in SPLITS]
    assert [len(part) for part in ids] == [1258, 180, 359]
    np.testing.assert_array_equal(np.sort(np.concatenate(ids)), np.arange(1797))
    assert all((np.diff(part) > 0).all() for part in ids)
    assert digits.carved == {
        "validation": "180 rows carved from train by seed 0",
        "test": "359 rows carved from train by seed 0",
    }


def test_opening_twice_gives_the_same(digits: DataSource) -> None:
    again = DigitsParams().open()
    assert again.fingerprint == digits.fingerprint
    ids = digits.split("train").sample_ids[[0, 4]]
    assert again.split("train").read(ids).equals(digits.split("train").read(ids))


def test_split_seed_changes_rows_but_not_the_fingerprint(digits: DataSource) -> None:
    other = DigitsParams(split_seed=1).open()
    assert not np.array_equal(other.split("test").sample_ids, digits.split("test").sample_ids)
    assert other.fingerprint == digits.fingerprint


def test_digits_are_always_in_memory() -> None:
    assert DigitsParams(memory_bytes=0).open().in_memory("train")


def test_table_reader_gives_rows_in_the_order_asked(digits: DataSource) -> None:
    reader = digits.load("train")
    ids = reader.sample_ids[[7, 3, 1200, 3]]
    table = reader.read(ids)
    np.testing.assert_array_equal(table[SAMPLE_ID].to_numpy(), ids)
    pieces = pa.concat_tables([reader.table.slice(0, 5), reader.table.slice(5)])
    assert TableReader(pieces, reader.rows).read(ids).equals(table)
    assert reader.encoded_bytes == reader.table[ENCODED].nbytes >= 1258 * 64


@pytest.mark.parametrize("sample_id", [-1, 1797, 10**12])
def test_ids_of_another_split_are_refused(digits: DataSource, sample_id: int) -> None:
    with pytest.raises(DataError, match=f"sample {sample_id} is not one of the 1258 rows"):
        digits.split("train").read(np.array([digits.split("train").sample_ids[0], sample_id]))
    foreign = digits.split("test").sample_ids[:1]
    with pytest.raises(DataError, match="is not one of"):
        digits.split("train").read(foreign)


def test_a_table_of_another_length_is_refused(digits: DataSource) -> None:
    reader = digits.load("train")
    with pytest.raises(DataError, match="has 10 rows"):
        TableReader(reader.table.slice(0, 10), reader.rows)


def test_validation_rows_do_not_depend_on_whether_test_is_carved() -> None:
    both = carve(100, {"validation": 0.1, "test": 0.2}, seed=3)
    one = carve(100, {"validation": 0.1}, seed=3)
    np.testing.assert_array_equal(both["validation"].ids, one["validation"].ids)
    assert one["train"].num_rows == 90


def test_carving_draws_at_least_one_row_and_leaves_one() -> None:
    assert {name: rows.num_rows for name, rows in carve(3, {"validation": 0.1, "test": 0.2}, 0).items()} == {
        "validation": 1,
        "test": 1,
        "train": 1,
    }
    with pytest.raises(DataError, match=r"hold 2 rows, too few to carve 1 for validation and 1 for test"):
        carve(2, {"validation": 0.1, "test": 0.2}, 0)


def test_row_sets_pickle_small_whatever_their_size() -> None:
    rows = carve(10**6, {"validation": 0.1}, 0)["train"]
    assert len(rows.ids) == 900_000
    assert len(pickle.dumps(rows)) < 300
    assert pickle.loads(pickle.dumps(rows)) == rows


def test_permutations_are_golden() -> None:
    # Part of the contract: runs and caches of other versions rely on these numbers.
    assert permutation(10, (ORDER_KEY, 0, 0, 0)).tolist() == [9, 2, 4, 7, 5, 0, 8, 6, 3, 1]
    assert permutation(10, (CARVE_KEY, 0)).tolist() == [7, 3, 6, 0, 8, 1, 4, 9, 5, 2]
    assert RowSet.whole(4).ids.tolist() == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="read-only"):
        permutation(10, (ORDER_KEY, 0, 0, 0))[0] = 1


def test_fractions_that_leave_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must be below 1, got 0\.5 \+ 0\.5"):
        DigitsParams(validation_fraction=0.5, test_fraction=0.5)


def test_the_order_of_digits_pickles_small(digits: DataSource) -> None:
    order = EpochOrder(digits.split("train"), seed=0)
    before = order.ids(0, 0, 100)
    assert len(pickle.dumps(order)) < 500
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(order)).ids(0, 0, 100), before)


def test_registry_finds_every_module() -> None:
    assert set(DATASETS.names()) >= {"digits", "parquet"}


def test_importing_the_package_is_light() -> None:
    code = (
        "import sys, pipeline.data as d; d.DATASETS.names(); "
        "print([m for m in ('torch', 'ray', 'sklearn', 'PIL', 'pandas') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
