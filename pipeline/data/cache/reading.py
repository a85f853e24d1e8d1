"""Logits out of a cache, for any rows in any order, every byte of it checked."""

from __future__ import annotations

import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from pipeline.data.cache.encoding import MISSING, Columns, as_table, column_array, column_types, to_arrow
from pipeline.data.cache.folder import NUM_READERS, CacheFolder
from pipeline.data.cache.key import CacheKey
from pipeline.data.cache.manifest import Manifest, read_manifest
from pipeline.data.cache.opened import Cache, open_cache
from pipeline.data.cache.parts import Part, PartRecord, due_ids, read_part
from pipeline.data.order.rows import RowSet
from pipeline.data.sources.source import SplitReader, positions_of
from pipeline.errors import CacheError


class LogitsReader(Protocol):
    """Reads the logits of rows in a view, in any process."""

    @property
    def num_views(self) -> int:
        """Views that the cache holds."""
        ...

    def read(self, view: int, sample_ids: np.ndarray) -> pa.Table:
        """The logits of rows, as they are stored; ``decode_logits`` turns them into numbers.

        Args:
            view: of the rows.
            sample_ids: (B,) int64; ids may repeat.

        Returns:
            B rows, in this order: the columns of ``column_types``, and ``missing`` bool: the row could not be decoded
            when the cache was built, its logits are zeros.

        Raises:
            CacheError: a view that the cache does not have; a file of it that is missing or damaged.
            DataError: a row that is not of the split.
        """
        ...


class LoadedLogits:
    """The logits of a split in all views, in memory.

    Args:
        table: one row for each view and row of the split, by view and then by sample id. It may live in shared memory:
            nothing is copied.
        rows: of the split.
        num_views: of the cache.
    """

    def __init__(self, table: pa.Table, rows: RowSet, num_views: int) -> None:
        self.table = table.combine_chunks()
        self.rows = rows
        self._num_views = num_views

    @property
    def num_views(self) -> int:
        """Views that the cache holds."""
        return self._num_views

    def read(self, view: int, sample_ids: np.ndarray) -> pa.Table:
        _check_view(view, self.num_views)
        positions = positions_of(sample_ids, self.rows.ids) + view * self.rows.num_rows
        stored = [name for name in self.table.column_names if name != MISSING]
        taken = as_table({name: column_array(self.table[name])[positions] for name in stored})
        return taken.append_column(MISSING, self.table[MISSING].take(to_arrow(positions)))


def load_logits(cache: Cache) -> LoadedLogits:
    """Reads what a cache has of the rows it was opened for into memory.

    Raises:
        CacheError: a file is missing or damaged.
    """
    manifest, rows = cache.manifest, cache.rows
    layout, columns = manifest.layout, _allocate(manifest, manifest.key.num_views * rows.num_rows)

    def load(record: PartRecord) -> None:
        part = read_part(cache.folder, manifest.key, record, due_ids(layout, record))
        places = np.minimum(np.searchsorted(rows.ids, part.sample_ids), rows.num_rows - 1)
        wanted = np.flatnonzero(rows.ids[places] == part.sample_ids)  # the cache may hold more
        _copy_rows(columns, places[wanted] + record.view * rows.num_rows, part, wanted)

    with ThreadPoolExecutor(NUM_READERS) as pool:
        for _ in pool.map(load, manifest.parts):  # raises what a part raised
            pass
    return LoadedLogits(as_table(columns), rows, manifest.key.num_views)


class WindowedLogits:
    """Reads the parts that it needs; each process keeps the last ones.

    Pickles small: the manifest is read again, once in a process, and must be the same.

    Args:
        cache: as opened.
        limit_bytes: of the parts that a process keeps; at least those of two windows, or rows that come in shuffled
            order would read every part again and again.
    """

    def __init__(self, cache: Cache, limit_bytes: int) -> None:
        self._folder = cache.folder
        self._limit_bytes = limit_bytes
        self._checksum = cache.manifest.checksum
        self._num_views = cache.manifest.key.num_views
        self._index: _Index | None = _Index(cache.manifest)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_index": None}

    @property
    def num_views(self) -> int:
        """Views that the cache holds."""
        return self._num_views

    def read(self, view: int, sample_ids: np.ndarray) -> pa.Table:
        if self._index is None:
            self._index = _open_index(self._folder, self._checksum)
        index = self._index
        _check_view(view, self.num_views)
        positions_of(sample_ids, index.layout.rows.ids)  # raises for ids that are not in the cache
        columns = _allocate(index.manifest, len(sample_ids))
        owners = index.layout.owners(sample_ids)
        by_part = np.argsort(owners, kind="stable")
        for run in np.split(by_part, np.flatnonzero(np.diff(owners[by_part])) + 1):
            part = self._part(index, view, int(owners[run[0]]))
            if len(part.sample_ids):
                places = np.minimum(np.searchsorted(part.sample_ids, sample_ids[run]), len(part.sample_ids) - 1)
                found = part.sample_ids[places] == sample_ids[run]  # others could not be decoded
                _copy_rows(columns, run[found], part, places[found])
        return as_table(columns)

    def _part(self, index: _Index, view: int, number: int) -> Part:
        record = index.records[view, number]
        key = (self._folder.root, record.name, record.sha256)
        part = _KEPT.get(key)
        if part is None:
            part = read_part(self._folder, index.manifest.key, record, due_ids(index.layout, record))
            _KEPT.put(key, part, self._limit_bytes)
        return part


class LogitsToCome:
    """Reads a cache that is not there yet when the run begins: each process opens it when it first reads.

    Args:
        path: ``cache.path``.
        key: of the cache.
        reader: of the train split.
        limit_bytes: as of ``WindowedLogits``.
    """

    def __init__(self, path: str, key: CacheKey, reader: SplitReader, limit_bytes: int) -> None:
        self._path, self._key, self._reader, self._limit_bytes = path, key, reader, limit_bytes

    @property
    def num_views(self) -> int:
        """Views that the cache will hold."""
        return self._key.num_views

    def read(self, view: int, sample_ids: np.ndarray) -> pa.Table:
        place = (self._path, self._key.digest)
        if place not in _OPENED:
            _OPENED[place] = WindowedLogits(open_cache(self._path, self._key, self._reader), self._limit_bytes)
        return _OPENED[place].read(view, sample_ids)


_OPENED: dict[tuple[str, str], WindowedLogits] = {}
"""By path and digest: tasks come with readers of their own, and a manifest takes its time to be read."""


class _Index:
    """A manifest, with its parts by view and number."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.layout = manifest.layout
        self.records = {(record.view, record.index): record for record in manifest.parts}


@lru_cache(maxsize=4)
def _open_index(folder: CacheFolder, checksum: str) -> _Index:
    manifest = read_manifest(folder)
    if manifest.checksum != checksum:
        raise CacheError(
            f"the cache {folder.shown} was built anew since the run began; resume the run, which opens it again."
        )
    return _Index(manifest)


class _KeptParts:
    """The parts this process read last, up to a number of bytes, and one at least."""

    def __init__(self) -> None:
        self._parts: OrderedDict[object, Part] = OrderedDict()
        self._num_bytes = 0
        self._lock = threading.Lock()

    def get(self, key: object) -> Part | None:
        with self._lock:
            if key in self._parts:
                self._parts.move_to_end(key)
            return self._parts.get(key)

    def put(self, key: object, part: Part, limit_bytes: int) -> None:
        with self._lock:
            if key not in self._parts:
                self._num_bytes += part.num_bytes
            self._parts[key] = part
            while self._num_bytes > limit_bytes and len(self._parts) > 1:
                _, dropped = self._parts.popitem(last=False)
                self._num_bytes -= dropped.num_bytes


_KEPT = _KeptParts()


def _check_view(view: int, num_views: int) -> None:
    if not 0 <= view < num_views:
        raise CacheError(f"the cache has views 0 to {num_views - 1}, not {view}; set data.num_views={num_views}.")


def _allocate(manifest: Manifest, num_rows: int) -> Columns:
    """Rows that are all missing."""
    types = column_types(manifest.key, manifest.key.num_classes)
    columns: Columns = {
        name: np.zeros(num_rows if width is None else (num_rows, width), dtype)
        for name, (dtype, width) in types.items()
    }
    return columns | {MISSING: np.ones(num_rows, bool)}


def _copy_rows(columns: Columns, places: np.ndarray, part: Part, rows: np.ndarray) -> None:
    """Puts rows of a part into these places."""
    for name, values in part.columns.items():
        columns[name][places] = values[rows]
    columns[MISSING][places] = False
