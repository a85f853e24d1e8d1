"""Logits out of a cache: any rows in any order, from memory or by parts, with what could not be decoded marked."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.data.cache import Cache, LogitsReader, WindowedLogits, decode_logits, load_logits, open_cache, reading
from pipeline.data.cache.encoding import MISSING
from pipeline.errors import CacheError, DataError
from tests.unit.caches import NUM_CLASSES, NUM_ROWS, NUM_VIEWS, make_cache, make_key, make_logits, make_reader

ENCODINGS: list[dict[str, Any]] = [{}, {"dtype": "float32"}, {"format": "topk", "k": 5}]
WAYS = ["loaded", "windowed"]


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch: pytest.MonkeyPatch) -> reading._KeptParts:
    kept = reading._KeptParts()
    monkeypatch.setattr(reading, "_KEPT", kept)
    reading._open_index.cache_clear()
    return kept


def open_logits(cache: Cache, way: str, limit_bytes: int = 2**20) -> LogitsReader:
    return load_logits(cache) if way == "loaded" else WindowedLogits(cache, limit_bytes)


def test_both_ways_are_logits_readers(tmp_path: Path) -> None:
    readers: list[LogitsReader] = [open_logits(make_cache(tmp_path), "loaded"), WindowedLogits(make_cache(tmp_path), 1)]
    assert [reader.read(0, np.array([0])).num_rows for reader in readers] == [1, 1]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("group_rows", [7, 60, None])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_rows_come_back_in_any_order(
    tmp_path: Path, encoding: dict[str, Any], group_rows: int | None, way: str
) -> None:
    logits, reader = make_logits(), make_reader(5, 50, group_rows)
    stored = make_cache(tmp_path, make_key(**encoding), reader, logits)
    logits_reader = open_logits(stored, way)
    draws = np.random.default_rng(1)
    for view in (0, 1, 0):
        for num_rows in (1, 8, 45, 200):
            ids = draws.choice(reader.sample_ids, num_rows)
            table = logits_reader.read(view, ids)
            decoded = decode_logits(table, NUM_CLASSES, 4)
            assert not any(table[MISSING].to_pylist())
            if encoding == {"dtype": "float32"}:
                assert decoded.tobytes() == logits[view, ids].tobytes()
            else:
                kept = np.argsort(-logits[view, ids], axis=1)[:, :5]
                np.testing.assert_allclose(
                    np.take_along_axis(decoded, kept, 1), np.take_along_axis(logits[view, ids], kept, 1), atol=0.02
                )


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_both_ways_read_the_same(tmp_path: Path, encoding: dict[str, Any]) -> None:
    cache = make_cache(tmp_path, make_key(**encoding), absent=[3, 20])
    one, other = (open_logits(cache, way) for way in WAYS)
    ids = np.random.default_rng(0).permutation(NUM_ROWS)
    for view in range(NUM_VIEWS):
        assert one.read(view, ids).equals(other.read(view, ids))
        assert one.read(view, ids).schema == other.read(view, ids).schema


@pytest.mark.parametrize("way", WAYS)
def test_rows_that_could_not_be_decoded_are_missing(tmp_path: Path, way: str) -> None:
    absent = [*range(7, 14), 20]  # a whole part, and a row of another
    cache = make_cache(tmp_path, make_key(dtype="float32"), absent=absent)
    assert cache.manifest.absent.tolist() == absent
    assert cache.manifest.num_rows == NUM_VIEWS * (NUM_ROWS - len(absent))
    ids = np.array([20, 21, 7, 59, 13, 0])
    table = open_logits(cache, way).read(1, ids)
    assert table[MISSING].to_pylist() == [True, False, True, False, True, False]
    decoded, good = decode_logits(table, NUM_CLASSES, 1), [1, 3, 5]
    np.testing.assert_array_equal(decoded[good], make_logits()[1, ids[good]])
    assert np.isfinite(decoded).all()


@pytest.mark.parametrize("way", WAYS)
def test_pickled_readers_read_the_same(tmp_path: Path, way: str) -> None:
    reader = open_logits(make_cache(tmp_path), way)
    again = pickle.loads(pickle.dumps(reader))
    ids = np.arange(NUM_ROWS)
    assert again.read(1, ids).equals(reader.read(1, ids))


def test_a_windowed_reader_pickles_small(tmp_path: Path) -> None:
    assert len(pickle.dumps(WindowedLogits(make_cache(tmp_path), 1))) < 1000


def test_loaded_logits_share_memory() -> None:
    table = reading.as_table({"logits": np.zeros((6, 4), np.float32), MISSING: np.zeros(6, bool)})
    loaded = reading.LoadedLogits(table, make_reader().rows, 1)
    assert loaded.table["logits"].chunk(0).values.buffers()[1].address == (
        table["logits"].chunk(0).values.buffers()[1].address
    )


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("view", [-1, NUM_VIEWS])
def test_other_views(tmp_path: Path, way: str, view: int) -> None:
    with pytest.raises(CacheError, match=rf"has views 0 to 1, not {view}; set data\.num_views=2"):
        open_logits(make_cache(tmp_path), way).read(view, np.array([0]))


@pytest.mark.parametrize("way", WAYS)
def test_rows_of_another_split(tmp_path: Path, way: str) -> None:
    reader = make_reader(10)
    lacking = np.setdiff1d(np.arange(NUM_ROWS), reader.sample_ids)
    cache = make_cache(tmp_path, reader=reader)
    with pytest.raises(DataError, match=f"sample {lacking[0]} is not one of the 50 rows"):
        open_logits(cache, way).read(0, np.array([reader.sample_ids[0], lacking[0]]))


@pytest.mark.parametrize("way", WAYS)
def test_a_cache_of_more_rows_serves(tmp_path: Path, way: str) -> None:
    key, logits, fewer = make_key(dtype="float32"), make_logits(), make_reader(25)
    make_cache(tmp_path, key, make_reader(10), logits)
    cache = open_cache(str(tmp_path), key, fewer)
    reader = open_logits(cache, way)
    ids = fewer.sample_ids[::-1]
    decoded = decode_logits(reader.read(1, ids), NUM_CLASSES, 1)
    np.testing.assert_array_equal(decoded, logits[1, ids])
    if way == "loaded":
        assert reader.table.num_rows == NUM_VIEWS * fewer.num_rows  # type: ignore[attr-defined]


def test_a_process_keeps_no_more_than_its_limit(
    tmp_path: Path, nothing_kept: reading._KeptParts, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = make_cache(tmp_path, reader=make_reader(group_rows=5))
    largest = max(part.num_bytes for part in cache.manifest.parts)
    read: list[str] = []
    original = reading.read_part

    def record(folder: Any, key: Any, part: Any, due: Any) -> Any:
        read.append(part.name)
        return original(folder, key, part, due)

    monkeypatch.setattr(reading, "read_part", record)
    windowed = WindowedLogits(cache, 4 * largest)
    draws = np.random.default_rng(0)
    for view in range(NUM_VIEWS):
        for start in range(0, NUM_ROWS, 10):  # windows of two parts, shuffled
            window = draws.permutation(np.arange(start, start + 10))
            for ids in np.split(window, 5):
                windowed.read(view, ids)
                kept = sum(part.num_bytes for part in nothing_kept._parts.values())
                assert kept == nothing_kept._num_bytes <= 4 * largest < cache.manifest.num_bytes / 4
    assert sorted(read) == sorted(part.name for part in cache.manifest.parts)  # each once
    WindowedLogits(cache, 1).read(0, np.arange(NUM_ROWS))
    assert len(nothing_kept._parts) == 1


def test_a_cache_that_was_built_anew_is_noticed(tmp_path: Path) -> None:
    reader = make_reader()
    cache = make_cache(tmp_path, reader=reader)
    pickled = pickle.dumps(WindowedLogits(cache, 2**20))
    (Path(cache.folder.root) / cache.manifest.parts[0].name).unlink()
    make_cache(tmp_path, reader=reader, logits=make_logits(seed=1))
    with pytest.raises(CacheError, match="was built anew since the run began; resume the run"):
        pickle.loads(pickled).read(0, np.array([0]))
