"""Rows out of Parquet files, by whole row groups."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from pipeline.contracts.columns import NO_LABEL
from pipeline.data.order.rows import RowGroups, RowSet
from pipeline.data.pixels.decode import BAD, SourceFile, name_row
from pipeline.data.sources.parquet_column import ImageColumn
from pipeline.data.sources.source import SplitReader, make_table, positions_of
from pipeline.data.storage import explain_s3
from pipeline.data.waiting import ask_storage
from pipeline.errors import DataError


@dataclass(frozen=True)
class ParquetFile:
    """One file of a split.

    Attributes:
        path: within its file system.
        version: size and time of modification when it was opened; tells a rewritten file from the old one.
    """

    path: str
    version: tuple[int, int | None]


class _GroupCache:
    """The row groups this process read last, up to a number of bytes."""

    def __init__(self) -> None:
        self._groups: OrderedDict[object, pa.Table] = OrderedDict()
        self._num_bytes = 0
        self._lock = threading.Lock()

    def get(self, key: object) -> pa.Table | None:
        with self._lock:
            if key in self._groups:
                self._groups.move_to_end(key)
            return self._groups.get(key)

    def put(self, key: object, table: pa.Table, limit_bytes: int) -> None:
        with self._lock:
            if key not in self._groups:
                self._num_bytes += table.nbytes
            self._groups[key] = table
            while self._num_bytes > limit_bytes and len(self._groups) > 1:
                _, dropped = self._groups.popitem(last=False)
                self._num_bytes -= dropped.nbytes


_CACHE = _GroupCache()


class ParquetReader(SplitReader):
    """Reads a split from its files, and only the row groups that it needs.

    Pickles small: paths, the layout of row groups, and rules.

    Args:
        filesystem: the files are on.
        files: in the order of sample ids.
        names: of the same files, for messages.
        groups: row groups of the files.
        rows: the rows of the split.
        column: format of the image column.
        label_column: name of the label column; none: the rows have no label.
        skip_bad: mark rows that do not have that format, or a label below 0, instead of refusing them.
        cache_bytes: row groups that each process keeps; enough for two windows, or rows that come in shuffled
            order would read every group again and again.
    """

    groups: RowGroups

    def __init__(
        self,
        filesystem: pafs.FileSystem,
        files: tuple[ParquetFile, ...],
        names: tuple[SourceFile, ...],
        groups: RowGroups,
        rows: RowSet,
        column: ImageColumn,
        label_column: str | None,
        cache_bytes: int,
        skip_bad: bool = False,
    ) -> None:
        self.rows = rows
        self.groups = groups
        self._filesystem = filesystem
        self._files = files
        self._names = names
        self._column = column
        self._label_column = label_column
        self._cache_bytes = cache_bytes
        self._skip_bad = skip_bad

    @property
    def encoded_bytes(self) -> int:
        # Each group counts by its share of rows in the split.
        shares = np.diff(self.groups.bounds(self.rows)) / np.maximum(self.groups.num_rows, 1)
        return int((shares * self.groups.num_bytes).sum())

    @property
    def group_bytes(self) -> np.ndarray:
        """(G,) int64 encoded bytes of each row group."""
        return self.groups.num_bytes

    def group_ids(self, index: int) -> np.ndarray:
        """Sample ids of the split in a row group: int64, ascending."""
        bounds = self.groups.bounds(self.rows)
        return self.sample_ids[bounds[index] : bounds[index + 1]]

    def read(self, sample_ids: np.ndarray) -> pa.Table:
        positions_of(sample_ids, self.sample_ids)  # raises for ids of another split
        owners = np.searchsorted(self.groups.first_row, sample_ids, side="right") - 1
        by_group = np.argsort(owners, kind="stable")
        parts = []
        for run in np.split(by_group, np.flatnonzero(np.diff(owners[by_group])) + 1):
            owner = int(owners[run[0]])
            parts.append(_take(self._group(owner), sample_ids[run] - self.groups.first_row[owner]))
        table = pa.concat_tables(parts).combine_chunks()
        if np.array_equal(by_group, np.arange(len(by_group))):
            return table
        places = np.empty_like(by_group)
        places[by_group] = np.arange(len(by_group))
        return table.take(pa.array(places))

    def _group(self, index: int) -> pa.Table:
        file = self._files[self.groups.file[index]]
        # Where the file begins is part of the key: the table has sample ids, and a file may be read in several sets.
        first_row = int(self.groups.first_row[index])
        key = (file, int(self.groups.index[index]), first_row, self._column, self._label_column, self._skip_bad)
        table = _CACHE.get(key)
        if table is None:
            table = self._read_group(file, index)
            _CACHE.put(key, table, self._cache_bytes)
        return table

    def _read_group(self, file: ParquetFile, index: int) -> pa.Table:
        first_row, num_rows = int(self.groups.first_row[index]), int(self.groups.num_rows[index])
        name = self._names[self.groups.file[index]].path
        columns = [self._column.leaf, *([self._label_column] if self._label_column else [])]

        def read() -> pa.Table:
            with pq.ParquetFile(file.path, filesystem=self._filesystem) as parquet:
                return parquet.read_row_group(int(self.groups.index[index]), columns=columns, use_threads=False)

        try:
            raw = ask_storage(self._filesystem, file.path, read)
        except (OSError, pa.ArrowException) as error:
            raise DataError(
                explain_s3(error, name)
                or f"{name}: cannot read row group {self.groups.index[index]} ({str(error).splitlines()[0]}); "
                "the file was removed, changed or damaged since the run began; restore it."
            ) from error
        if raw.num_rows != num_rows:
            raise DataError(
                f"{name}: row group {self.groups.index[index]} has {raw.num_rows} rows, expected {num_rows}; "
                "the file has changed since the run began; restore it or start a new run."
            )
        stored, sample_ids = raw[self._column.name].combine_chunks(), np.arange(first_row, first_row + num_rows)
        labels = self._take_labels(raw)
        if self._skip_bad:
            encoded, bad = self._column.normalise_good(stored)
            bad |= labels < NO_LABEL
            table = make_table(sample_ids, encoded, pa.array(np.maximum(labels, NO_LABEL)))
            return table.append_column(BAD, pa.array(bad))
        encoded = self._column.normalise(stored, lambda row: name_row(self._names, first_row + row))
        return make_table(sample_ids, encoded, pa.array(labels))

    def _take_labels(self, raw: pa.Table) -> np.ndarray:
        """(N,) int64: NO_LABEL where there is none, and below that what is stored below 0."""
        if self._label_column is None:
            return np.full(raw.num_rows, NO_LABEL)
        stored = raw[self._label_column].combine_chunks().cast(pa.int64())
        missing = stored.is_null().to_numpy(zero_copy_only=False)
        labels = stored.fill_null(0).to_numpy()
        return np.where(missing, NO_LABEL, np.where(labels < 0, NO_LABEL - 1, labels))


def _take(group: pa.Table, rows: np.ndarray) -> pa.Table:
    if len(rows) == group.num_rows and np.array_equal(rows, np.arange(len(rows))):
        return group
    return group.take(pa.array(rows))
