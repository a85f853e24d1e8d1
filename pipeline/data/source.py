"""What a data set offers: readers of its splits, a decoder, and what identifies it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol

import numpy as np
import pyarrow as pa

from pipeline.contracts.columns import ENCODED, LABEL, SAMPLE_ID, InputSpec, SplitName
from pipeline.data.decode import Decoder
from pipeline.data.rows import RowGroups, RowSet
from pipeline.errors import DataError


class SplitReader(ABC):
    """Reads rows of one split, in any process.

    Attributes:
        rows: which rows belong to the split.
        groups: row groups of the files behind it; none where the split is in memory.
    """

    rows: RowSet
    groups: RowGroups | None = None

    @property
    def sample_ids(self) -> np.ndarray:
        """Ids of the split: int64, ascending, read-only."""
        return self.rows.ids

    @property
    def num_rows(self) -> int:
        return self.rows.num_rows

    @property
    @abstractmethod
    def encoded_bytes(self) -> int:
        """Size of the split's ``encoded`` column in memory."""

    @abstractmethod
    def read(self, sample_ids: np.ndarray) -> pa.Table:
        """The rows with these ids, in this order.

        Args:
            sample_ids: (B,) int64; ids may repeat.

        Returns:
            B rows: ``sample_id`` int64, ``encoded`` (large_binary, or a fixed-size list of uint8 or float32) and
            ``label`` int64.

        Raises:
            DataError: an id is not of this split, or a file cannot be read.
        """


class TableReader(SplitReader):
    """A split held in memory.

    Args:
        table: columns ``sample_id`` (ascending), ``encoded`` and ``label``, one row for every id of ``rows``. It may
            live in shared memory: nothing is copied unless a column has several chunks.
        rows: which rows these are; ``reader.rows`` of the reader they came from.
    """

    def __init__(self, table: pa.Table, rows: RowSet) -> None:
        if table.num_rows != rows.num_rows:
            raise DataError(f"the table has {table.num_rows} rows, but the split it is said to hold {rows.num_rows}.")
        self.table = table.combine_chunks()  # taking rows out of several chunks is not O(batch)
        self.rows = rows

    @property
    def encoded_bytes(self) -> int:
        return int(self.table[ENCODED].nbytes)

    def read(self, sample_ids: np.ndarray) -> pa.Table:
        return self.table.take(pa.array(positions_of(sample_ids, self.sample_ids)))


def positions_of(wanted: np.ndarray, sample_ids: np.ndarray) -> np.ndarray:
    """Positions of ``wanted`` in the ascending ``sample_ids``.

    Raises:
        DataError: one of them is not there.
    """
    positions = np.searchsorted(sample_ids, wanted)
    found = sample_ids[np.minimum(positions, len(sample_ids) - 1)]
    if not np.array_equal(found, wanted):
        missing = int(np.asarray(wanted)[np.flatnonzero(found != wanted)[0]])
        raise DataError(f"sample {missing} is not one of the {len(sample_ids)} rows of this split.", sample_id=missing)
    return positions


def make_table(sample_ids: np.ndarray, encoded: pa.Array, labels: pa.Array) -> pa.Table:
    """The three columns every reader gives."""
    return pa.table({SAMPLE_ID: pa.array(sample_ids, pa.int64()), ENCODED: encoded, LABEL: labels})


class RowDecoder(Protocol):
    """Anything that turns the ``encoded`` column into arrays: a decoder, or a whole source."""

    def decode(self, table: pa.Table) -> np.ndarray: ...


class DataSource(ABC):
    """An opened data set with its three splits.

    Attributes:
        spec: what a network is given, and the classes.
        fingerprint: hash of what a teacher sees; labels and the way splits are carved are not part of it, so logits
            kept under it outlive a relabelling.
        carved: for each split without files of its own, a phrase saying where its rows come from.
        memory_bytes: a split of up to this many encoded bytes is held in memory.
    """

    spec: InputSpec
    fingerprint: str
    carved: dict[SplitName, str]
    memory_bytes: int

    @abstractmethod
    def split(self, name: SplitName) -> SplitReader:
        """The reader of a split; cheap to pickle unless it holds a table."""

    @abstractmethod
    def decoder(self, name: SplitName) -> Decoder:
        """The small, picklable decoder of a split's rows; it knows the split's files by name."""

    def decode(self, table: pa.Table) -> np.ndarray:
        """As ``Decoder.decode``, for rows of any split: an error names the sample id, but no file."""
        return Decoder(self.spec.kind, self.spec.shape).decode(table)

    def in_memory(self, name: SplitName) -> bool:
        """Whether the split is small enough to be held in memory and shuffled as a whole."""
        reader = self.split(name)
        return isinstance(reader, TableReader) or reader.encoded_bytes <= self.memory_bytes

    def load(self, name: SplitName) -> TableReader:
        """Reads a whole split into memory."""
        reader = self.split(name)
        if isinstance(reader, TableReader):
            return reader
        return TableReader(reader.read(reader.sample_ids), reader.rows)


def describe_carved(rows: RowSet) -> str:
    """Where the rows of a carved split come from, for people."""
    return f"{rows.num_rows} rows carved from train by seed {rows.seed}"
