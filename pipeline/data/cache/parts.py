"""Parts: the rows of one source row group in one view, a file each."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Self

import numpy as np
import pyarrow as pa

from pipeline.contracts.columns import SAMPLE_ID
from pipeline.data.bad_rows import NO_SAMPLE
from pipeline.data.cache.encoding import Columns, arrow_type, column_array, column_types, encode_logits, to_arrow
from pipeline.data.cache.folder import REBUILD, CacheFolder
from pipeline.data.cache.key import CacheKey
from pipeline.data.order.rows import RowSet
from pipeline.data.sources.source import SplitReader
from pipeline.errors import CacheError, StreamError
from pipeline.registry import Params

RUN_ROWS = 4096
"""Rows of the source to a part, where the source has no row groups."""

# Of a part's schema: what it belongs to, and a hash of its columns, which is there before a manifest is.
_KEY, _PLACE, _DUE, _CONTENT = b"cache_key", b"place", b"due_rows", b"content_sha256"


class PartLayout:
    """Which rows of a split make up each part. Parts are numbered by row group, so those without rows have no part.

    Args:
        rows: of the split.
        first_rows: (G,) int64 sample id of the first row of each row group.

    Attributes:
        indexes: numbers of the parts, ascending.
    """

    def __init__(self, rows: RowSet, first_rows: np.ndarray) -> None:
        self.rows = rows
        self.first_rows = first_rows

    @classmethod
    def of(cls, reader: SplitReader) -> Self:
        """By the reader's row groups, or by fixed runs of rows where it has none."""
        if reader.groups is not None:
            return cls(reader.rows, reader.groups.first_row)
        return cls(reader.rows, np.arange(0, reader.rows.num_source_rows, RUN_ROWS))

    @property
    def indexes(self) -> list[int]:
        bounds = np.searchsorted(self.rows.ids, np.append(self.first_rows, self.rows.num_source_rows))
        return np.flatnonzero(np.diff(bounds)).tolist()

    def ids(self, index: int) -> np.ndarray:
        """Sample ids of a part's rows: int64, ascending."""
        next_row = [*self.first_rows[index + 1 : index + 2], self.rows.num_source_rows][0]
        start, stop = np.searchsorted(self.rows.ids, [self.first_rows[index], next_row])
        return self.rows.ids[start:stop]

    def owners(self, sample_ids: np.ndarray) -> np.ndarray:
        """(B,) number of the part that each row is in."""
        return np.searchsorted(self.first_rows, sample_ids, side="right") - 1


class PartRecord(Params):
    """What the manifest says of a part."""

    view: int
    index: int
    num_rows: int
    num_bytes: int
    sha256: str
    """Of the file."""
    absent: tuple[int, ...] = ()
    """Sample ids of rows that are not in it, because they could not be decoded."""

    @property
    def name(self) -> str:
        """Of the file."""
        return part_name(self.view, self.index)


def due_ids(layout: PartLayout, record: PartRecord) -> np.ndarray:
    """Sample ids that a part has to hold: int64, ascending."""
    ids = layout.ids(record.index)
    return ids[~np.isin(ids, record.absent)] if record.absent else ids


@dataclass(frozen=True)
class Part:
    """A part in memory.

    Attributes:
        sample_ids: (N,) int64, ascending.
        columns: as of ``column_types``, N rows each; over the memory of the file.
        num_bytes: of the file.
    """

    sample_ids: np.ndarray
    columns: Columns
    num_bytes: int


def part_name(view: int, index: int) -> str:
    """Path of a part below its cache."""
    return f"view-{view:04d}/part-{index:06d}.arrow"


@dataclass(frozen=True)
class PartWriter:
    """Writes parts, in any process.

    Attributes:
        folder: of the cache.
        key: of the cache.
        layout: of the split that it is built for.
    """

    folder: CacheFolder
    key: CacheKey
    layout: PartLayout

    def write(self, view: int, index: int, sample_ids: np.ndarray, logits: np.ndarray) -> None:
        """Writes a part, whole or not at all. One that is there is left as it is.

        Args:
            view: of the rows.
            index: of the part.
            sample_ids: (N,) int64, all rows of the part, in any order; NO_SAMPLE for those that could not be decoded.
            logits: (N, C) float32.

        Raises:
            StreamError: these are not the rows of the part.
            CacheError: logits that cannot be stored, or a disk that does not take them.
        """
        name, due = part_name(view, index), self.layout.ids(index)
        good = np.flatnonzero(sample_ids != NO_SAMPLE)
        good = good[np.argsort(sample_ids[good], kind="stable")]
        ids = sample_ids[good]
        if len(sample_ids) != len(due) or len(np.unique(ids)) != len(ids) or not np.isin(ids, due).all():
            raise StreamError(
                f"part {index} of view {view} was given {len(sample_ids)} rows, expected the {len(due)} with "
                f"sample ids {due[0]} to {due[-1]}, each once; the stream lost or repeated rows. Please report this."
            )
        if self.folder.exists(name):  # of two builders the first wins, and readers find what they have checked
            return
        try:
            columns = encode_logits(logits[good], self.key)
        except CacheError as error:
            row = int(ids[error.details["row"]]) if "row" in error.details else None
            raise CacheError(f"sample {row} in view {view}: {error.message}", sample_id=row) from error
        self.folder.write(name, format_part(self.key, name, due, ids, columns))

    def write_encoded(self, view: int, index: int, sample_ids: np.ndarray, columns: Columns) -> None:
        """As ``write``, of rows that are encoded already; those of the part that are not among them are absent.

        Args:
            sample_ids: (N,) int64, ascending.
            columns: as of ``column_types``, N rows each.
        """
        name = part_name(view, index)
        if not self.folder.exists(name):
            self.folder.write(name, format_part(self.key, name, self.layout.ids(index), sample_ids, columns))


def format_part(key: CacheKey, name: str, due: np.ndarray, sample_ids: np.ndarray, columns: Columns) -> pa.Buffer:
    """The bytes of a part's file: an Arrow IPC file of one record batch, not compressed.

    Args:
        name: of the part.
        due: sample ids of all rows of the part.
        sample_ids: (N,) of those that could be decoded.
        columns: as of ``column_types``, N rows each.
    """
    arrays = [to_arrow(sample_ids), *(to_arrow(columns[name]) for name in column_types(key, key.num_classes))]
    names = [SAMPLE_ID, *column_types(key, key.num_classes)]
    metadata = {
        _KEY: key.digest.encode(),
        _PLACE: name.encode(),
        _DUE: hash_ids(due).encode(),
        _CONTENT: _hash_content(sample_ids, columns).encode(),
    }
    schema = pa.schema([(name, array.type) for name, array in zip(names, arrays, strict=True)], metadata)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(pa.record_batch(arrays, schema=schema))
    return sink.getvalue()


def read_part(folder: CacheFolder, key: CacheKey, record: PartRecord, due: np.ndarray) -> Part:
    """Reads a part and checks it against the manifest.

    Args:
        record: of the manifest.
        due: (N,) sample ids that it has to hold.

    Raises:
        CacheError: it is missing, damaged, or another one.
    """
    content, where = folder.read(record.name), folder.show(record.name)
    if content.size != record.num_bytes:
        raise CacheError(f"{where} has {content.size} bytes, expected {record.num_bytes}; {REBUILD}.")
    if hashlib.sha256(content).hexdigest() != record.sha256:
        raise CacheError(f"{where} is damaged: its checksum is not that of the manifest; {REBUILD}.")
    part, _ = _parse(content, where, key)
    if not np.array_equal(part.sample_ids, due):
        raise CacheError(f"{where} does not hold the {len(due)} rows that are due; {REBUILD}.")
    return part


def read_segment(folder: CacheFolder, key: CacheKey, name: str) -> Part:
    """Reads rows that ``format_part`` wrote under some name, checked by the hash that they carry themselves.

    Raises:
        CacheError: the file is missing, damaged, or of another cache or place.
    """
    return _read_checked(folder, key, name)[0]


def _read_checked(folder: CacheFolder, key: CacheKey, name: str) -> tuple[Part, pa.Buffer, dict[bytes, bytes]]:
    content, where = folder.read(name), folder.show(name)
    part, metadata = _parse(content, where, key)
    if metadata.get(_KEY) != key.digest.encode() or metadata.get(_PLACE) != name.encode():
        raise CacheError(f"{where} is a part of another cache, or of another place in this one; {REBUILD}.")
    if metadata.get(_CONTENT) != _hash_content(part.sample_ids, part.columns).encode():
        raise CacheError(f"{where} is damaged: its content does not fit its checksum; {REBUILD}.")
    return part, content, metadata


def inspect_part(folder: CacheFolder, key: CacheKey, view: int, index: int, due: np.ndarray) -> PartRecord:
    """What the manifest has to say of a part that is there, checked by the hash it carries itself.

    Args:
        due: (N,) sample ids of the part's rows, whether they could be decoded or not.

    Raises:
        CacheError: it is missing, damaged, of another cache, or of other rows.
    """
    name = part_name(view, index)
    part, content, metadata = _read_checked(folder, key, name)
    if metadata.get(_DUE) != hash_ids(due).encode():
        raise CacheError(f"{folder.show(name)} was made of other rows than the {len(due)} that are due; {REBUILD}.")
    return PartRecord(
        view=view,
        index=index,
        num_rows=len(part.sample_ids),
        num_bytes=content.size,
        sha256=hashlib.sha256(content).hexdigest(),
        absent=tuple(np.setdiff1d(due, part.sample_ids).tolist()),
    )


def _parse(content: pa.Buffer, where: str, key: CacheKey) -> tuple[Part, dict[bytes, bytes]]:
    try:
        with pa.ipc.open_file(pa.BufferReader(content)) as file:
            batch = file.get_batch(0)
            batch.validate(full=True)
    except (OSError, pa.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise CacheError(f"{where} is damaged, or no part of a cache ({reason}); {REBUILD}.") from error
    types = {name: arrow_type(dtype, width) for name, (dtype, width) in column_types(key, key.num_classes).items()}
    found = {field.name: field.type for field in batch.schema}
    if found != {SAMPLE_ID: pa.int64()} | types:
        raise CacheError(f"{where} does not have the columns of this cache, but {', '.join(found)}; {REBUILD}.")
    columns = {name: column_array(batch[name]) for name in types}
    return Part(column_array(batch[SAMPLE_ID]), columns, content.size), dict(batch.schema.metadata or {})


def hash_ids(sample_ids: np.ndarray) -> str:
    """16 hexadecimal digits that tell sets of rows apart."""
    return hashlib.sha256(np.ascontiguousarray(sample_ids, "<i8").data).hexdigest()[:16]


def _hash_content(sample_ids: np.ndarray, columns: Columns) -> str:
    digest = hashlib.sha256(np.ascontiguousarray(sample_ids).data)
    for name in sorted(columns):
        digest.update(np.ascontiguousarray(columns[name]).data)
    return digest.hexdigest()
