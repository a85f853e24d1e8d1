"""Filling a cache while training: blocks are kept as they are computed, and rewritten as parts once all are there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from pipeline.data.bad_rows import NO_SAMPLE
from pipeline.data.cache.build import CacheBuild
from pipeline.data.cache.encoding import Columns, column_types, encode_logits
from pipeline.data.cache.folder import CacheFolder
from pipeline.data.cache.key import CacheKey
from pipeline.data.cache.parts import format_part, read_segment
from pipeline.data.cache.sizes import row_bytes

FILL = "fill-"
"""What the name of a fill's folder begins with."""

_GROUP_BYTES = 2**29  # of parts that are put together at a time

Compute = Callable[[int, np.ndarray], Iterator[tuple[np.ndarray, np.ndarray]]]
"""Takes a view and sample ids (N,); yields sample ids, NO_SAMPLE for rows that cannot be decoded, and logits (B, C)."""


@dataclass(frozen=True)
class FillWriter:
    """Keeps the logits of training blocks, in any process. A block that comes again replaces itself by the same.

    Attributes:
        folder: of the cache.
        key: of the cache.
        name: of this fill's own folder in it: several runs may fill one cache.
    """

    folder: CacheFolder
    key: CacheKey
    name: str

    def write(self, position: int, view: int, sample_ids: np.ndarray, logits: np.ndarray) -> None:
        """Keeps a block, whole or not at all.

        Args:
            position: of the block in the run.
            view: of its rows; views repeat after those that the cache holds.
            sample_ids: (B,) int64; one may stand in for others, and so come more than once.
            logits: (B, C) float32.

        Raises:
            CacheError: logits that cannot be stored, or a disk that does not take them.
        """
        view %= self.key.num_views
        name = f"{self.name}/view-{view:04d}/block-{position:010d}.arrow"
        columns = encode_logits(logits, self.key)
        self.folder.write(name, format_part(self.key, name, sample_ids, sample_ids, columns))

    def blocks(self, view: int) -> list[str]:
        """Names of the blocks that are kept of a view."""
        prefix = f"{self.name}/view-{view:04d}/"
        return sorted(name for name in self.folder.list_files() if name.startswith(prefix) and name.endswith(".arrow"))

    def remove(self) -> None:
        """Deletes what was kept; a cache that is complete does not need it."""
        for name in self.folder.list_files():
            if name.startswith(f"{self.name}/"):
                self.folder.delete(name)
        self.folder.below(self.name).delete_folder()


def rewrite_blocks(writer: FillWriter, build: CacheBuild, compute: Compute) -> int:
    """Writes every part that the cache lacks from the blocks that were kept.

    Args:
        writer: that kept them.
        build: of the cache.
        compute: the teacher, for rows that were in no block: an epoch leaves out what does not fill one.

    Returns:
        Rows that had to be computed.

    Raises:
        CacheError: a block is damaged, or a disk does not take the parts.
    """
    num_computed = 0
    for view, indexes in _group(build):
        ids = np.concatenate([build.layout.ids(index) for index in indexes])
        columns, found = _collect(writer, view, ids)
        for computed, logits in compute(view, ids[~found]):
            good = computed != NO_SAMPLE
            _place(columns, found, ids, computed[good], encode_logits(logits[good], writer.key))
            num_computed += len(computed)
        for index in indexes:
            due = build.layout.ids(index)
            places = np.searchsorted(ids, due)
            places = places[found[places]]  # the others could not be decoded
            build.writer.write_encoded(view, index, ids[places], {name: rows[places] for name, rows in columns.items()})
    return num_computed


def _group(build: CacheBuild) -> Iterator[tuple[int, list[int]]]:
    """The parts that are missing, of one view and up to some size at a time."""
    group_rows = max(_GROUP_BYTES // row_bytes(build.key.num_classes, build.key), 1)
    pending: tuple[int, list[int]] | None = None
    num_rows = 0
    for view, index in build.find_missing_parts():
        rows = len(build.layout.ids(index))
        if pending is not None and (pending[0] != view or num_rows + rows > group_rows):
            yield pending
            pending = None
        if pending is None:
            pending, num_rows = (view, []), 0
        pending[1].append(index)
        num_rows += rows
    if pending is not None:
        yield pending


def _collect(writer: FillWriter, view: int, ids: np.ndarray) -> tuple[Columns, np.ndarray]:
    """Columns of the rows with these ids as far as blocks hold them, and which do."""
    types = column_types(writer.key, writer.key.num_classes)
    columns: Columns = {
        name: np.zeros(len(ids) if width is None else (len(ids), width), dtype)
        for name, (dtype, width) in types.items()
    }
    found = np.zeros(len(ids), bool)
    for name in writer.blocks(view):
        block = read_segment(writer.folder, writer.key, name)
        _place(columns, found, ids, block.sample_ids, block.columns)
    return columns, found


def _place(columns: Columns, found: np.ndarray, ids: np.ndarray, sample_ids: np.ndarray, rows: Columns) -> None:
    places = np.minimum(np.searchsorted(ids, sample_ids), len(ids) - 1)
    wanted = ids[places] == sample_ids
    for name, values in rows.items():
        columns[name][places[wanted]] = values[wanted]
    found[places[wanted]] = True
