"""Small caches of made-up logits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.data import AugmentParams, RowGroups, RowSet, SplitReader
from pipeline.data.bad_rows import NO_SAMPLE
from pipeline.data.cache import Cache, CacheKey, open_build

NUM_ROWS, NUM_VIEWS, NUM_CLASSES = 60, 2, 12


class RowsOnly(SplitReader):
    """A reader that knows which rows there are, which is all that a cache asks."""

    def __init__(self, rows: RowSet, groups: RowGroups | None) -> None:
        self.rows = rows
        self.groups = groups

    @property
    def encoded_bytes(self) -> int:
        return self.num_rows

    def read(self, sample_ids: np.ndarray) -> pa.Table:
        raise AssertionError("a cache asks which rows there are, never for their pixels")


def make_reader(start: int = 0, stop: int | None = None, group_rows: int | None = 7, seed: int = 3) -> RowsOnly:
    """Rows of a split, by default all of them, in row groups of which one is empty."""
    rows = RowSet(NUM_ROWS, seed, start, NUM_ROWS if stop is None else stop)
    if group_rows is None:
        return RowsOnly(rows, None)
    first = np.sort(np.append(np.arange(0, NUM_ROWS, group_rows), 2 * group_rows))
    sizes = np.diff(np.append(first, NUM_ROWS))
    number = np.arange(len(first))
    return RowsOnly(rows, RowGroups(np.zeros_like(number), number, first, sizes, sizes * 100))


def make_key(**changes: Any) -> CacheKey:
    values: dict[str, Any] = {
        "teacher": "0123456789abcdef",
        "architecture": {"name": "resnet20", "depth": 20},
        "preprocessing": {"mean": [0.5, 0.5, 0.5], "size": None},
        "precision": "float32",
        "data": "fedcba9876543210",
        "augment": AugmentParams(flip=True).model_dump(),
        "seed": 0,
        "num_views": NUM_VIEWS,
        "num_classes": NUM_CLASSES,
    }
    return CacheKey(**(values | changes))


def make_logits(num_views: int = NUM_VIEWS, num_classes: int = NUM_CLASSES, seed: int = 0) -> np.ndarray:
    """(views, rows of the source, classes) float32."""
    logits = np.random.default_rng(seed).normal(size=(num_views, NUM_ROWS, num_classes)) * 4
    return logits.astype(np.float32)


def write_parts(
    path: Path | str,
    key: CacheKey,
    reader: SplitReader,
    logits: np.ndarray,
    absent: Sequence[int] = (),
    num_parts: int | None = None,
) -> None:
    """Writes the parts that are missing, or the first few of them, and does not seal them."""
    with open_build(str(path), key, reader) as build:
        for view, index in build.find_missing_parts()[:num_parts]:
            ids = build.layout.ids(index)
            told = np.where(np.isin(ids, list(absent)), NO_SAMPLE, ids)
            order = np.random.default_rng(index).permutation(len(ids))
            build.writer.write(view, index, told[order], logits[view, ids[order]])


def make_cache(
    path: Path | str,
    key: CacheKey | None = None,
    reader: SplitReader | None = None,
    logits: np.ndarray | None = None,
    absent: Sequence[int] = (),
) -> Cache:
    key = make_key() if key is None else key
    reader = make_reader() if reader is None else reader
    logits = make_logits(key.num_views, key.num_classes) if logits is None else logits
    write_parts(path, key, reader, logits, absent)
    with open_build(str(path), key, reader) as build:
        return build.seal(0.75, {"created": "today"})


def files_of(path: Path) -> dict[str, bytes]:
    """The content of every file, by its path below this one; but for locks, which hold no logits."""
    return {
        str(file.relative_to(path)): file.read_bytes()
        for file in sorted(path.rglob("*"))
        if file.is_file() and file.name != ".lock"
    }
