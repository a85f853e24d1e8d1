"""What a data set offers: readers of its splits, a decoder, and what identifies it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np
import pyarrow as pa

from pipeline.contracts.columns import ENCODED, LABEL, SAMPLE_ID, InputSpec, SplitName
from pipeline.data.order.rows import RowGroups, RowSet
from pipeline.data.pixels.decode import Decoder, SourceFile, name_row
from pipeline.errors import DataError

_LABELS_AT_ONCE = 4096  # rows come with their pixels


class SplitReader(ABC):
    """Reads rows of one split, in any process.

    Attributes:
        rows: which rows belong to the split.
        groups: row groups of the files behind it: what is read, and mixed, together; none where it has none.
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
            ``label`` int64, NO_LABEL where there is none. With ``data.on_bad_row=skip`` there may be a boolean column
            ``bad``: the row could not be brought into this form, and its ``encoded`` is a placeholder.

        Raises:
            DataError: an id is not of this split, or a file cannot be read.
        """

    def read_labels(self) -> np.ndarray:
        """(N,) int64 labels of the whole split in the order of its ids; NO_LABEL where there is none."""
        parts = (
            self.read(self.sample_ids[at : at + _LABELS_AT_ONCE]) for at in range(0, self.num_rows, _LABELS_AT_ONCE)
        )
        return np.concatenate([part[LABEL].to_numpy() for part in parts])


class TableReader(SplitReader):
    """A split held in memory.

    Args:
        table: columns ``sample_id`` (ascending), ``encoded`` and ``label``, one row for every id of ``rows``. It may
            live in shared memory: nothing is copied unless a column has several chunks.
        rows: which rows these are; ``reader.rows`` of the reader they came from.
        groups: ``reader.groups`` of that reader.
    """

    def __init__(self, table: pa.Table, rows: RowSet, groups: RowGroups | None = None) -> None:
        if table.num_rows != rows.num_rows:
            raise DataError(f"the table has {table.num_rows} rows, but the split it is said to hold {rows.num_rows}.")
        self.table = table.combine_chunks()  # taking rows out of several chunks is not O(batch)
        self.rows = rows
        self.groups = groups

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


@dataclass(frozen=True)
class Unlabelled:
    """The rows of a split that have no label.

    Attributes:
        num_rows: how many.
        num_split_rows: rows of the split, with a label or without.
        first: the first of them by name, and what is missing there, for messages.
    """

    num_rows: int
    num_split_rows: int
    first: str


def find_unlabelled(
    missing: np.ndarray, rows: RowSet, files: Sequence[SourceFile], reason: str = ""
) -> Unlabelled | None:
    """The rows of a split that have no label; none where all have one.

    Args:
        missing: (N,) bool over the source's rows: has no label.
        rows: of the split.
        files: the source's files.
        reason: what is missing there, if more can be said than that it is missing.
    """
    unlabelled = rows.ids[missing[rows.ids]]
    if len(unlabelled) == 0:
        return None
    first = name_row(files, int(unlabelled[0]))
    return Unlabelled(len(unlabelled), rows.num_rows, f"{first}, {reason}" if reason else first)


class DataSource(ABC):
    """An opened data set with its three splits.

    Attributes:
        spec: what a network is given, and the classes.
        fingerprint: hash of what a teacher sees; labels and the way splits are carved are not part of it, so logits
            kept under it outlive a relabelling.
        carved: for each split without files of its own, a phrase saying where its rows come from.
        memory_bytes: a split of up to this many encoded bytes is held in memory.
        unlabelled: for each split that has rows without label, which. Whether that matters depends on the loss.
    """

    spec: InputSpec
    fingerprint: str
    carved: dict[SplitName, str]
    memory_bytes: int
    unlabelled: Mapping[SplitName, Unlabelled] = MappingProxyType({})

    @abstractmethod
    def split(self, name: SplitName) -> SplitReader:
        """The reader of a split; cheap to pickle unless it holds a table."""

    @abstractmethod
    def decoder(self, name: SplitName) -> Decoder:
        """The small, picklable decoder of a split's rows; it knows the split's files by name."""

    def decode(self, table: pa.Table) -> np.ndarray:
        """As ``Decoder.decode``, for rows of any split: an error names the sample id, but no file."""
        return replace(self.decoder("train"), files=()).decode(table)

    def in_memory(self, name: SplitName) -> bool:
        """Whether the split is small enough to be held in memory and shuffled as a whole."""
        reader = self.split(name)
        return isinstance(reader, TableReader) or reader.encoded_bytes <= self.memory_bytes

    def load(self, name: SplitName) -> TableReader:
        """Reads a whole split into memory."""
        reader = self.split(name)
        if isinstance(reader, TableReader):
            return reader
        return TableReader(reader.read(reader.sample_ids), reader.rows, reader.groups)


def check_fits(spec: InputSpec, kind: str, shape: tuple[int, ...], where: str, *, encoded: bool = False) -> None:
    """Refuses rows that a network cannot be given.

    Args:
        spec: what the network was trained on.
        kind: of the rows.
        shape: of the rows: (C, H, W) or (F,).
        where: they are, for messages.
        encoded: as image files, which a network of three channels is given grey as well.

    Raises:
        DataError: kind, channels or size do not fit.
    """
    told = {"image": "images of (channels, height, width)", "features": "feature vectors of length"}
    expected = f"expected {told[spec.kind]} {_show(spec.shape)} as the network was trained on"
    got = f"holds {told[kind]} {_show(shape)}"
    if kind != spec.kind or (kind == "features" and shape != spec.shape):
        raise DataError(f"{where} {got}, {expected}; give rows of that kind.")
    if shape[0] != spec.shape[0] and not (encoded and (shape[0], spec.shape[0]) == (1, 3)):
        raise DataError(f"{where} {got}, {expected}; give images of {spec.shape[0]} channels.")
    if shape[1:] != spec.shape[1:]:
        raise DataError(f"{where} {got}, {expected}; set data.image_size=[{spec.shape[1]},{spec.shape[2]}].")


def _show(shape: tuple[int, ...]) -> str:
    return str(shape[0]) if len(shape) == 1 else str(tuple(shape))


def describe_carved(rows: RowSet) -> str:
    """Where the rows of a carved split come from, for people."""
    return f"{rows.num_rows} rows carved from train by seed {rows.seed}"
